"""Text models of the zoo: what their `transformers` configurations leave open."""

import torch
from torch import Tensor, nn


class SentenceClassifier(nn.Module):
    """A linear classifier on the masked mean of an encoder's last hidden state.

    Args:
        encoder: A `transformers` encoder of the given width.
        width: Size of a hidden state.
        num_classes: Number of logits.
    """

    def __init__(self, encoder: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Maps tokens and their mask, int64 [N, L], to logits [N, num_classes]."""
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
        logits: Tensor = self.classifier(mean)
        return logits


def perturb_vectors(model: nn.Module) -> None:
    """Moves the biases and norm weights of an untrained model away from 0 and 1, which would hide mistakes."""
    for name, parameter in model.named_parameters():
        if parameter.ndim != 1:
            continue
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0.0, 0.02)
        else:
            nn.init.uniform_(parameter, 0.9, 1.1)


def token_inputs(batch_size: int, length: int, vocab_size: int) -> dict[str, Tensor]:
    """Random tokens, int64 [N, L], for a causal model."""
    return {"input_ids": torch.randint(1, vocab_size, (batch_size, length))}


def masked_token_inputs(batch_size: int, length: int, vocab_size: int) -> dict[str, Tensor]:
    """Random tokens and their mask, int64 [N, L]: the first text is full, later ones are ever more padded."""
    lengths = length - torch.arange(batch_size) * length // (2 * batch_size)
    mask = (torch.arange(length) < lengths.unsqueeze(1)).to(torch.int64)
    return {"input_ids": torch.randint(1, vocab_size, (batch_size, length)) * mask, "attention_mask": mask}
