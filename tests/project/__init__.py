"""The project itself: its limits, its layers, its set-up commands."""
