"""An app for a device: frames of a folder, a film or a live source, classified, explained and shown."""
