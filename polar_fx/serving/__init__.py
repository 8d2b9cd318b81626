"""Serving: an HTTP server over a bundle with routes that OpenAI clients speak, on Ray Serve (`pip
install 'polar_fx[serve]'`).

`requests` reads what a client asks, `engine` runs what waits as batches by program, `answers`
writes the responses, `measures` counts. `app` alone knows Ray. See docs/serving.md.
"""
