"""Dual-view decoding: a student's tokens of the whole image, decoded by the teacher's frozen decoder from two
complementary halves of them.

MIM-HD: Making Smaller Masked Autoencoder Better with Efficient Distillation, section 3.3. There is no public code; what
the paper leaves open is said in place.

Letters: B images, N patches, K views, V visible patches of a view, P prefix tokens, Ds and Dt widths of student and
teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimlet.data.batch import Batch
from mimlet.data.masks import Mask, MaskSampler, RandomMasking
from mimlet.errors import ConfigError
from mimlet.methods.settings import DualViewSettings, TermSettings
from mimlet.methods.terms import Term
from mimlet.models.encoder import Encoder
from mimlet.models.features import Features, Taps
from mimlet.models.linear import Linear
from mimlet.models.parts import init_mae
from mimlet.models.teacher import Teacher, class_token_advice
from mimlet.objectives.reconstruct import denormalise_patches, masked_pixel_loss, patchify, unpatchify


class DualView(Term):
    """Mean squared error of the pixels that the teacher's decoder makes of the student's final tokens.

    The first view shows the decoder a random part of the tokens, the second the rest, the class token both. Each patch
    is judged in the view that hides it: with two views every patch counts once, with one the hidden ones. Open in the
    paper: widths meet in a trained linear layer (the identity at the start where they are equal); the mask token is the
    decoder's, trained on; everything else of the decoder is frozen.
    """

    student_taps = Taps()

    def __init__(self, settings: TermSettings, encoder: Encoder, teacher: Teacher, *, masked: bool) -> None:
        super().__init__(settings, encoder, teacher, masked=masked)
        assert isinstance(settings, DualViewSettings)
        _check(encoder, teacher, masked)
        assert teacher.decoder is not None
        pixels = teacher.pixels if settings.target == "auto" else settings.target
        if pixels is None:
            raise ConfigError(
                f"{teacher.source} does not say which pixels its decoder was trained to predict; say it: "
                "method.dual_view.target=normalised (per patch) or raw"
            )
        self.normalise = pixels == "normalised"
        self.views, self.grid, self.prefix, self.patch = settings.views, encoder.grid, encoder.prefix, teacher.patch
        self.patch_mask = encoder.patch_mask
        # Methods of the teacher, not the teacher: a module held here would be trained and saved with the term.
        self.decode, self.inputs, self.outputs = teacher.decode, teacher.inputs, teacher.outputs
        self.adapter = Linear(encoder.dim, teacher.dim)
        init_mae(self.adapter)
        if encoder.dim == teacher.dim:
            nn.init.eye_(self.adapter.weight)
        self.mask_token = nn.Parameter(teacher.decoder.mask_token.detach().clone())
        label = f"{settings.label}_" if settings.label else ""
        self.loss_name, self.mask_name = f"{label}dual_view", f"{label}views"
        self.weights = {self.loss_name: settings.weight}
        self.sampler = RandomMasking(encoder.units, settings.mask_ratio)

    def masks(self) -> dict[str, MaskSampler]:
        """What the first view hides."""
        return {self.mask_name: self.sampler}

    def forward(self, student: Features, teacher: Features, batch: Batch) -> dict[str, Tensor]:
        """{dual_view}: the mean over patches and pixels. Reads the student's final tokens and the view `image`, which
        is the target even where the student saw another.
        """
        mask = self.patch_mask(batch.masks[self.mask_name])
        prediction, target = self.predict(student, mask), self.inputs(batch.images)
        loss = masked_pixel_loss(prediction, target, self.patch, self.predicted(mask), self.normalise)
        return {self.loss_name: loss}

    def predicted(self, mask: Mask) -> Tensor:
        """The patches that are predicted, [B,M]: what the first view hides, then what the second hides."""
        assert mask.ids_keep is not None
        return mask.ids_hidden if self.views == 1 else torch.cat([mask.ids_hidden, mask.ids_keep], dim=1)

    def predict(self, student: Features, mask: Mask) -> Tensor:
        """Predictions [B,M,p*p*3] in the order of `predicted`: one pass of the decoder where views are equally large,
        else one for each.
        """
        assert mask.ids_keep is not None
        tokens = self.adapter(student.latent)
        views = [mask] if self.views == 1 else [mask, mask.complement()]
        even = 2 * mask.ids_keep.shape[1] == mask.hidden.shape[1]
        passes = [views] if even else [[view] for view in views]
        return torch.cat([self._decode(tokens, each) for each in passes], dim=1)

    def _decode(self, tokens: Tensor, views: list[Mask]) -> Tensor:
        """Tokens [B,P+N,Dt] of the whole image and K views of equal size -> [B,K*(N-V),p*p*3], view after view."""
        B, T, width = tokens.shape
        mask = side_by_side(views)
        assert mask.ids_keep is not None
        # The class token, where there is one, is row 0 of its image.
        rows = F.pad(mask.ids_keep + self.prefix, (self.prefix, 0)).view(B, -1)
        rows = rows + T * torch.arange(B, device=rows.device)[:, None]
        latent = tokens.flatten(0, 1).index_select(0, rows.flatten()).view(len(mask.hidden), -1, width)
        return self.decode(latent, mask, self.mask_token).view(B, -1, 3 * self.patch**2)

    def pictures(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        """original, visible (what the first view shows) and reconstruction (each patch from the view that hides it), in
        the student's normalisation.
        """
        mask, images = self.patch_mask(batch.masks[self.mask_name]), self.inputs(batch.images)
        ids, target = self.predicted(mask), patchify(images, self.patch)
        prediction = self.predict(student, mask).float()
        if self.normalise:
            prediction = denormalise_patches(prediction, patchify(images, self.patch, ids))
        shown = {
            "original": target,
            "visible": target.masked_fill(mask.hidden[..., None], 0),
            "reconstruction": target.scatter(1, ids[..., None].expand_as(prediction), prediction),
        }
        return {name: self.outputs(unpatchify(patches, self.grid)) for name, patches in shown.items()}


def side_by_side(views: list[Mask]) -> Mask:
    """K masks [B,U] that show equally many units -> one of [B*K,U], the views of an image beside each other."""
    hidden, ids_keep, ids_restore = (
        torch.stack([getattr(view, name) for view in views], dim=1).flatten(0, 1)
        for name in ("hidden", "ids_keep", "ids_restore")
    )
    return Mask(hidden, ids_keep, ids_restore)


def _check(encoder: Encoder, teacher: Teacher, masked: bool) -> None:
    """Raises `ConfigError` where a student cannot be decoded by a teacher."""
    if masked:
        raise ConfigError(
            "dual_view hides tokens of the whole image, and this method shows the student only the visible patches; "
            "use it with a method that shows whole images (mimhd, tinymim)"
        )
    decoder = teacher.decoder
    if decoder is None:
        raise ConfigError(f"{teacher.source} brings no decoder, and dual_view teaches through the teacher's decoder")
    if isinstance(teacher.encoder, Encoder) and teacher.encoder.decodes != "tokens":
        raise ConfigError(
            f"dual_view: the decoder of {teacher.source} reads {teacher.encoder.decodes} of {teacher.encoder.family}, "
            "and the student gives it tokens; take the MAE of a plain ViT or of a Hiera as teacher, or "
            "method.reconstruct=false"
        )
    if decoder.grid != encoder.grid:
        theirs, ours = (f"{rows} x {columns}" for rows, columns in (decoder.grid, encoder.grid))
        raise ConfigError(
            f"dual_view: the decoder of {teacher.source} predicts {theirs} patches, the student has {ours}; "
            "set teacher.grid=input, or give the student another encoder.image_size or encoder.patch"
        )
    if decoder.prefix != encoder.prefix:
        has, student = ("a", "none") if decoder.prefix else ("no", "one")
        raise ConfigError(
            f"dual_view: the decoder of {teacher.source} has {has} class token, the student {student}; "
            + class_token_advice(encoder, decoder.prefix)
        )
