"""Data for training and evaluation: prompts, pictures with texts and labels, augmentation."""
