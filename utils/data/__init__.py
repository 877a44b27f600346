"""From folders of images to batches on the device."""
