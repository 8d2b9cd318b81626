"""What tests of the service and of the server share: a chat template, and answers asked alone."""

import torch

from polar_fx.serving.service import Service

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% "
    "endif %}{{ m.content }} {% endfor %}"
)


def alone(service: Service, prompt: list[int], *, program: str, tokens: int) -> str:
    ids = torch.tensor([prompt])
    new = service.bundle.generate(
        ids, program=program, max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )[0, len(prompt) :]
    return service.tokenizer.decode(new, skip_special_tokens=True)
