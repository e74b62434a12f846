"""Run a fine-tuning recipe from a script of one's own. Run: python examples/finetune.py causal-lm-lora --steps 8.

The same file in each process of Accelerate: accelerate launch examples/finetune.py causal-lm-lora --steps 8, and with
kpt: accelerate launch -m kpt_lightning.launch examples/finetune.py causal-lm-lora --steps 8
"""

import argparse
import json
import os
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="its name; 'kpt finetune --list' prints all")
    parser.add_argument("--model", help="a Hugging Face folder or hub name; default: the recipe's own")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--sequence-length", type=int, help="tokens in a row")
    parser.add_argument("--output", type=Path, help="folder that the model is written to")
    parser.add_argument("--losses", type=Path, help="JSON file for the training losses")
    parser.add_argument("--plain", action="store_true", help="Lightning without KptStrategy")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    from kpt_lightning.recipes.registry import default_config

    changes = {name: getattr(given, name) for name in ("model", "steps", "output")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if given.sequence_length is not None:
        changes["data"] = {"sequence_length": given.sequence_length}
    config = default_config(given.recipe, **changes)
    # Set by accelerate launch for each process.
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        from kpt_lightning.recipes import accelerate_run

        result = accelerate_run.fine_tune(config)
    else:
        from kpt_lightning.recipes import lightning_run

        result = lightning_run.fine_tune(config, strategy="auto" if given.plain else "kpt")
    if given.losses is not None and os.environ.get("RANK", "0") == "0":
        given.losses.write_text(json.dumps(result.losses))


if __name__ == "__main__":
    main()
