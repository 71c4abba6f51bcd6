"""What runs on the edge device: the example app, containers and set-up notes."""
