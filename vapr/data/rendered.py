"""Find prompts that already hold a rendered conversation, which a chat template would render a second time."""

import re

from vapr.data.pair import PreferencePair

MARKERS = re.compile(
    r"""
    <\|(?:im_start|start_header_id|user|assistant)\|> | <start_of_turn> | \[/?INST\]
    | \bUSER:\ .*\bASSISTANT: | \#\#\#\ ?(?:Human|User):.*\#\#\#\ ?Assistant:
    | \b(?:Assistant|ASSISTANT|Response):\s*\Z
    """,
    re.VERBOSE | re.DOTALL,
)
LONGEST_SHOWN = 30


def rendered_marker(pair: PreferencePair) -> str | None:
    """Return what only a chat template writes in a prompt's texts, shortened to be shown; None if there is nothing."""
    for message in pair.prompt:
        text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
        if message["role"] != "assistant" and (found := MARKERS.search(text)):
            marker = " ".join(found[0].split())
            return marker if len(marker) <= LONGEST_SHOWN else f"{marker[:8].strip()} ... {marker[-10:].strip()}"
    return None


def rendered_warning(where: str, marker: str, count: int, rows: int) -> str:
    """Return a warning about ``count`` of ``rows`` rows, the first of which is at ``where``."""
    return (
        f"warning: {where}: the prompt already holds a rendered conversation ({marker!r}), and the chat template "
        f"renders it once more; give its turns as messages ({count:,} of {rows:,} rows are so)"
    )
