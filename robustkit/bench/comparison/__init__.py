"""Runs side by side: image by image, and the gates of a build."""
