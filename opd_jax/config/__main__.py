"""Print docs/config.md: python -m opd_jax.config > docs/config.md."""

from opd_jax.config.page import as_markdown

if __name__ == "__main__":
    print(as_markdown(), end="")
