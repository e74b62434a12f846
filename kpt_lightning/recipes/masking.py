"""Masking of words as BERT was trained: 15 % are to be predicted; of these 80 % are masked and 10 % are other words.

Source of the shares: https://arxiv.org/abs/1810.04805, section 3.1.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kpt_lightning.recipes.task import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1
IGNORED = -100
"""Label of a word that is not predicted."""


class Masking:
    """Collate function. Which words are masked follows from the seed and the tokens of the batch alone.

    It is then the same in every driver and after every resume, and a row that is seen again is masked anew where its
    batch is another one. Rows that have labels were masked before and stay as they are.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", seed: int) -> None:
        """Keep the settings.

        Args:
            tokenizer: With a mask token.
            seed: Another one masks other words.
        """
        from transformers import DataCollatorForLanguageModeling

        self.seed = seed
        self.special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        self.collator = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=CHOSEN, mask_replace_prob=MASKED, random_replace_prob=RANDOM
        )

    def __call__(self, rows: list[Batch]) -> Batch:
        """A batch with ``input_ids`` and ``labels``, int64, shape ``(rows, length)``."""
        if "labels" in rows[0]:
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return self.mask([row["input_ids"] for row in rows])

    def mask(self, rows: Sequence[Tensor]) -> Batch:
        """Mask rows of equal length, at least one word of them."""
        tokens = torch.stack(list(rows))
        digest = hashlib.blake2b(f"{self.seed} ".encode() + tokens.numpy().tobytes(), digest_size=6).digest()
        # Its own seed goes with the name of the process; the generator does not.
        self.collator.generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        special = torch.isin(tokens, self.special)
        inputs, labels = self.collator.torch_mask_tokens(tokens.clone(), special_tokens_mask=special)
        if bool((labels == IGNORED).all()):
            # The mean loss over no word is no number.
            place = tuple((~special).nonzero()[0].tolist())
            labels[place], inputs[place] = tokens[place], self.collator.tokenizer.mask_token_id
        return {"input_ids": inputs, "labels": labels}
