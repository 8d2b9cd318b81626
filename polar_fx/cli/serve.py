"""Serve a bundle over HTTP, by routes that OpenAI clients speak: completions, chat, models; health
and metrics.

There is no authentication: keep it on loopback, or behind an authenticating proxy.
Ctrl-C or SIGTERM ends it.

Examples:
  python -m polar_fx serve bundle
  python -m polar_fx serve bundle --policy "steps<=0.9"
  python -m polar_fx serve bundle --port 9000 --max-batch 16 --threads 4
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "bundle", "prompt": "6 * 7 =", "max_tokens": 4, "temperature": 0,
         "program": "skip 5"}'
"""

import argparse
import logging
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..environment import install_command
from ..errors import InputError
from ..program import Program
from .options import whole
from .threads import warn_if_busy
from .verbosity import status, working

if TYPE_CHECKING:
    from ..bundle import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "bundle", type=Path, metavar="FOLDER", help="what `export` wrote, with its tokenizer"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=whole(1), default=8000, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--name", help="what clients call the model (default: the folder's name)")
    parser.add_argument(
        "--fingerprint", metavar="HASH", help="refuse the bundle if it has another one"
    )
    parser.add_argument(
        "--policy",
        help="by which requests that name no program get one (default: the bundle's)",
    )
    parser.add_argument(
        "--threads", type=whole(1), metavar="N", help="(default: as many as it was exported with)"
    )
    parser.add_argument(
        "--max-batch",
        type=whole(1),
        default=32,
        metavar="N",
        help="prompts that run together (default: %(default)s)",
    )
    parser.add_argument(
        "--wait-ms",
        type=whole(0),
        metavar="N",
        help="no longer needed: prompts join those that run between two tokens",
    )
    parser.add_argument(
        "--timeout",
        type=whole(1),
        default=300,
        metavar="S",
        help="seconds a request may take (%(default)s)",
    )


def execute(options: argparse.Namespace) -> dict[str, Any]:
    """Serve until interrupted."""
    from ..bundle import verify_bundle
    from ..bundle.manifest import GENERATION
    from ..bundle.settings import check_served, read_generation

    manifest = verify_bundle(options.bundle, fingerprint=options.fingerprint)
    if not manifest.has_tokenizer:
        raise InputError(f"the bundle {options.bundle} holds no tokenizer; export it with one")
    defaults = options.bundle / GENERATION
    check_served(read_generation(defaults, defaults.read_bytes()))
    if options.policy is not None:
        _check_policy(options, manifest)
    _check_free(options.host, options.port)
    try:
        import ray
        from ray import serve

        from ..serving.app import build
    except ImportError as error:
        raise InputError(
            f"serving needs ray, which is not installed; {install_command('serve')}"
        ) from error
    threads = options.threads or manifest.threads or 1
    warn_if_busy(threads, option="--threads")  # before ray's own start keeps them busy
    given = {
        "bundle": str(options.bundle),
        "name": options.name,
        "fingerprint": options.fingerprint,
        "threads": threads,
        "max_batch": options.max_batch,
        "policy": options.policy,
    }
    with working("starting ..."):
        _start_ray(verbose=bool(options.verbose))
    # what service managers send ends it as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.start(
            http_options={
                "host": options.host,
                "port": options.port,
                "request_timeout_s": options.timeout,
            }
        )
        serve.run(build({k: v for k, v in given.items() if v is not None}))
        url = f"http://{options.host}:{options.port}"
        about = (
            f"serving {options.bundle} at {url}/v1; {url}/ to try it in a browser, {url}/health, "
            f"{url}/metrics; Ctrl-C ends it"
        )
        status().print(about, markup=False, soft_wrap=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        status().print("ending ...")
    finally:
        serve.shutdown()
        ray.shutdown()
    return {"bundle": str(options.bundle), "host": options.host, "port": options.port}


def _start_ray(*, verbose: bool) -> None:
    """On this machine alone. What Ray says of itself, and hands on of its processes, is for -v."""
    import ray

    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(level)
    ray.init(address="local", include_dashboard=False, logging_level=level, log_to_driver=verbose)


def _check_policy(options: argparse.Namespace, manifest: "Manifest") -> None:
    """Raise InputError if the bundle cannot choose by --policy."""
    from ..bundle.manifest import PREDICTOR_FILES
    from ..predictor.policy import Policy

    policy = Policy.parse(options.policy, manifest.depth)
    program = Program.identity(manifest.depth) if policy.kind == "identity" else policy.program
    if program is not None and program not in manifest.programs:
        raise InputError(
            f"--policy {options.policy!r}: the bundle {options.bundle} holds no such program; "
            f'add it with `bundle add {options.bundle} "{options.policy}"`'
        )
    if program is None and not any(f.path in PREDICTOR_FILES for f in manifest.files):
        raise InputError(
            f"--policy {options.policy!r} needs a predictor, and the bundle {options.bundle} holds "
            "none; export it with --predictor, or name a program"
        )


def _check_free(host: str, port: int) -> None:
    """Raise InputError if nothing can listen there."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"nothing can listen at {host}:{port}: {error}; name another --host or --port"
        ) from error
