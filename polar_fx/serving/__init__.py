"""Serving: an HTTP server over a bundle with routes that OpenAI clients speak, on Ray Serve (`pip
install 'polar_fx[serve]'`).

`requests` reads what a client asks, `service` runs it on an engine, `answers` writes the
responses, `measures` counts. `app` alone knows Ray. See docs/serving.md.
"""
