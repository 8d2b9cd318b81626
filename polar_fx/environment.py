"""The one place that reads the environment.

| variable | meaning | default |
|---|---|---|
| POLAR_FX_CACHE_DIR | converted models and compiled artifacts | the user's cache folder |
"""

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Folder for everything that can be made again; it may not exist yet."""
    named = os.environ.get("POLAR_FX_CACHE_DIR")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("polar_fx", appauthor=False)
