"""Images and labels: data sets, folders, splits, decoding, augmentation."""
