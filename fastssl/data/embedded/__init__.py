"""The data that ships with the package: 10,000 Fashion-MNIST photographs as PNG contact sheets, ten classes."""
