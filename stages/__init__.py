"""What runs on one device: backbones, extraction, features, methods, tuning. No ray, no click."""
