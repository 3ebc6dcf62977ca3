"""Latents with all that one training step needs: noise, timestep and conditions."""

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..anatomy import load_label_map, remove_tumors
from ..imaging import MODALITIES, is_ct, modality_code, spacing_of, to_ras
from ..schedulers import MaisiRFlowScheduler
from .data_list import Case
from .latents import load_latent
from .randomness import case_generator

# Spacing and regions reach the UNet a hundredfold, as published.
CONDITION_SCALE = 100.0


class LatentDataset(torch.utils.data.Dataset):
    """
    Latents of a data list, with label maps or without. An item is the same whichever process or worker makes it.

    Args:
        cases: entries whose `image` is a latent.
        scheduler: draws the timesteps.
        seed: of all draws; `set_epoch` changes them.
        with_labels: give the label maps.
        tumors: give the label maps without these tumors too, tumor -> the labels it can sit in.
        modality_dropout: share of the cases whose modality becomes its parent (ct or mri), and of those whose modality
            becomes 0, unknown.
        latent_channels: channels of the latents; a file with twice as many holds mean and log-variance.

    Items, tensors that collate to a batch:
        latents (C, x, y, z) float32: unscaled.
        noise (C, x, y, z) float32.
        timesteps () float32 or int64.
        class_labels () int64: modality code.
        spacing (3,) float32, top_region_index (4,), bottom_region_index (4,): times 100, those that all cases have.
        encoder_hidden_states (1, 10) float32: sizes of the controllable anatomy, -1 for absent, if all have them.
        labels (1, X, Y, Z) uint8, tumor_free_labels (1, X, Y, Z) uint8: where asked for.
        index () int64: which case it is.
    """

    def __init__(
        self,
        cases: list[Case],
        scheduler: SchedulerMixin,
        seed: int,
        with_labels: bool = False,
        tumors: dict[int, tuple[int, ...]] | None = None,
        modality_dropout: float = 0.0,
        latent_channels: int = 4,
    ):
        self.cases = cases
        self.scheduler = scheduler
        self.seed = seed
        self.with_labels = with_labels
        self.tumors = tumors
        self.modality_dropout = modality_dropout
        self.latent_channels = latent_channels
        self.epoch = 0
        conditions = ("spacing", "top_region_index", "bottom_region_index", "organ_size")
        self._conditions = [name for name in conditions if all(getattr(case, name) is not None for case in cases)]

    def set_epoch(self, epoch: int) -> None:
        """Draw anew."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        case = self.cases[index]
        latents = load_latent(case.image, self.latent_channels, self._generator(index, "latent"))
        generator = self._generator(index, "noise")
        item = {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": draw_timestep(self.scheduler, latents, generator),
            "class_labels": self._class_label(case, index),
            "index": torch.tensor(index),
        }
        for name in self._conditions:
            condition = torch.tensor(getattr(case, name), dtype=torch.float32)
            if name == "organ_size":
                item["encoder_hidden_states"] = condition[None]
            else:
                item[name] = condition * CONDITION_SCALE
        if self.with_labels:
            label_map = to_ras(load_label_map(case.label))
            labels = np.ascontiguousarray(label_map.dataobj)
            item["labels"] = torch.from_numpy(labels)[None]
            if self.tumors is not None:
                healthy = remove_tumors(labels, spacing_of(label_map), self.tumors)
                item["tumor_free_labels"] = torch.from_numpy(healthy)[None]
        return item

    def _generator(self, index: int, purpose: str) -> torch.Generator:
        return case_generator(self.seed, self.epoch, index, purpose)

    def _class_label(self, case: Case, index: int) -> torch.Tensor:
        code = modality_code(case.modality)
        to_parent, to_unknown = torch.rand(2, generator=self._generator(index, "modality")) < self.modality_dropout
        if to_unknown:
            code = MODALITIES["unknown"]
        elif to_parent and code != MODALITIES["unknown"]:
            code = MODALITIES["ct"] if is_ct(code) else MODALITIES["mri"]
        return torch.tensor(code)


def draw_timestep(scheduler: SchedulerMixin, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A training timestep for latents (C, x, y, z), as a tensor without axes."""
    if isinstance(scheduler, MaisiRFlowScheduler):
        return scheduler.sample_timesteps(latents[None], generator)[0]
    return torch.randint(scheduler.config.num_train_timesteps, (), generator=generator)
