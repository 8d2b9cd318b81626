"""`python -m polar_fx.lm_harness`: the command line of lm-eval, where the model "polar_fx" is
known: the package registers it.
"""

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
