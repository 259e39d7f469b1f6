"""Images and what is done to them: sources, augmentation recipes, and the loaders that execute them."""
