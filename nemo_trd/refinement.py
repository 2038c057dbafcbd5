"""Refinement prompts: what the teacher sees when it rewrites a rollout, and which rewrites count.

Pure functions of records and a tokenizer. Source: the refinement step of arXiv 2606.08432; the
wording of the prompts is ours and stands in `conf/refinement/`.
"""

from __future__ import annotations

import re

PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def fill_template(template: str, **fields: str) -> str:
    """Put `fields` in the place of their `{name}` in one pass over the template.

    What is put in is never searched again, so a problem that contains "{rollout}" stays as it
    is. Braces around anything but a lower-case name, as in `\\boxed{}`, are plain text.

    Raises:
        ValueError: the template has a placeholder that is not in `fields`.
    """
    unknown = sorted(set(PLACEHOLDER.findall(template)) - set(fields))
    if unknown:
        names = ", ".join(f"{{{name}}}" for name in unknown)
        raise ValueError(f"template has no value for {names}; known: {', '.join(sorted(fields))}")
    return PLACEHOLDER.sub(lambda match: fields[match[1]], template)
