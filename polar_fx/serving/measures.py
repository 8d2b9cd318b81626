"""Counts of a server, in Prometheus' text form."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Measures:
    """Requests by route and status; tokens, rows and times by program."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_program = ("program",)
        self.requests = Counter(
            "polar_fx_requests", "Requests answered", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "polar_fx_request_seconds",
            "From a request's body to its response",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.answers = Counter(
            "polar_fx_answers", "Prompts answered", by_program, registry=self.registry
        )
        self.prompt_tokens = Counter(
            "polar_fx_prompt_tokens", "Tokens of prompts", by_program, registry=self.registry
        )
        self.new_tokens = Counter(
            "polar_fx_new_tokens", "Tokens generated", by_program, registry=self.registry
        )
        self.batch_rows = Histogram(
            "polar_fx_batch_rows",
            "Rows that decoded together with an answer, at most",
            by_program,
            buckets=_ROWS,
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "polar_fx_first_token_seconds",
            "From a prompt's arrival at the engine to its first new token",
            by_program,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.answer_seconds = Histogram(
            "polar_fx_answer_seconds",
            "From a prompt's arrival at the engine to the end of its answer",
            by_program,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.kv_bytes = Gauge(
            "polar_fx_kv_bytes", "Bytes allocated for keys and values", registry=self.registry
        )
        self.waiting = Gauge("polar_fx_waiting", "Prompts that wait or run", registry=self.registry)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)
