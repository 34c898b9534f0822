"""Write prompts of equal length as token ids: CPython's own help topics, so nothing is fetched."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from pydoc_data import topics

from transformers import AutoTokenizer


def main() -> None:
    """Write OUT: a JSON list of lists of token ids, in an order that `--seed` shuffles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-tokens", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    text = "\n\n".join(text for _, text in sorted(topics.topics.items()))
    ids = tokenizer(text, verbose=False)["input_ids"]
    starts = range(0, len(ids) - options.num_tokens + 1, options.num_tokens)
    prompts = [ids[start : start + options.num_tokens] for start in starts]
    random.Random(options.seed).shuffle(prompts)
    options.out.write_text(json.dumps(prompts))


if __name__ == "__main__":
    main()
