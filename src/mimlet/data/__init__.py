"""Images: sources, decoding, augmentation, masks, batches."""
