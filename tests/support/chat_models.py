"""Small random models that can chat, in directories."""

from pathlib import Path

from support.models import tiny_model
from support.tokenizers import byte_level

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def save(path: Path, *, template: str | None = TEMPLATE, **changes: object) -> str:
    """A small random model with a byte-level tokenizer, in a directory."""
    tokenizer = byte_level()
    tokenizer.chat_template = template
    tiny_model(vocab_size=len(tokenizer), **changes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
