"""The embedding that the UNet and the ControlNet have in common."""

import torch


def embed_time_and_class(
    model: torch.nn.Module,
    sample: torch.Tensor,
    timestep: torch.Tensor | float | int,
    class_labels: torch.Tensor | None,
) -> torch.Tensor:
    """
    Time embedding plus class embedding of a model that has `time_proj`, `time_embedding` and `class_embedding`.

    Args:
        model: the UNet or the ControlNet.
        sample (N, C, X, Y, Z): gives batch size, device and dtype.
        timestep: (N,), a scalar tensor or a number.
        class_labels (N,): modality codes; required by a model with class embeddings.

    Returns:
        (N, 4 * block_out_channels[0]) in the dtype of `sample`.
    """
    if not torch.is_tensor(timestep):
        timestep = torch.tensor(timestep, dtype=torch.float32, device=sample.device)
    timestep = timestep.to(sample.device).expand(sample.shape[0])
    # The sinusoids are computed in float32 whatever the model's dtype is.
    emb = model.time_embedding(model.time_proj(timestep).to(sample.dtype))
    if model.class_embedding is not None:
        if class_labels is None:
            raise ValueError("this model takes `class_labels` (modality codes), which were not given")
        emb = emb + model.class_embedding(class_labels).to(sample.dtype)
    return emb
