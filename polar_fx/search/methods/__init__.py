"""Search methods. They know programs and rewards only."""
