"""fastssl: self-supervised pre-training with momentum encoders, where all but the backbone costs next to nothing."""

__version__ = "0.1.0"
