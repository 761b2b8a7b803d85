"""The masked oracle: the same model, plain and slow. Nothing is ever removed; dropped patches are masked in attention.

Written independently of the packed code: dense tensors, timm's own ``Block.forward`` with a mask, the interpreter in
its plain form (every token projected to a key).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def plain_scores(interpreter, x, alive, prefix, has_class_token):
    """Equation of method.md section 1 to the letter, or relative scores. x (B, S, C), alive (B, N) -> (B, N)."""
    patches = x[:, prefix:]
    mean = (patches * alive[..., None]).sum(1) / alive.sum(1, keepdim=True)
    policy = x[:, 0] if has_class_token else mean
    width, heads = x.shape[-1], interpreter.num_heads
    q = interpreter.query(F.layer_norm(policy, (width,))).unflatten(-1, (heads, -1))  # (B, H, d)
    k = interpreter.key(F.layer_norm(patches, (width,))).unflatten(-1, (heads, -1))  # (B, N, H, d)
    logits = torch.einsum("bhd,bnhd->bnh", q, k) / (width // heads) ** 0.5
    if interpreter.relative:
        share = logits.masked_fill(~alive[..., None], -torch.inf).softmax(1).mean(-1)  # NaN where none is alive
        received = (share * alive.sum(1, keepdim=True)).nan_to_num()
        return received / (1 + received)
    return logits.sigmoid().mean(-1) * alive


def dense_tokens(vit, images):
    """``(B, S, C)`` and timm's rotary embedding of the patches, or None."""
    x = vit._pos_embed(vit.patch_embed(images))
    x, rope = x if isinstance(x, tuple) else (x, None)
    return vit.norm_pre(x), rope


def run_block(vit, index, x, rope, mask):
    """timm's own forward pass of a block; a mixed rotary embedding has its own angles in each."""
    if rope is None:
        return vit.blocks[index](x, attn_mask=mask)
    return vit.blocks[index](x, rope=rope[index] if getattr(vit, "rope_mixed", False) else rope, attn_mask=mask)


def masked_forward(model, images, decide):
    """Logits, scores and decisions of the reduced model without removing a token."""
    vit, prefix = model.backbone, model.backbone.num_prefix_tokens
    x, rope = dense_tokens(vit, images)
    alive = torch.ones(x.shape[0], x.shape[1] - prefix, dtype=torch.bool)
    scores, kept = [], []
    for group, blocks in enumerate(model.groups):
        score = plain_scores(model.interpreters[group], x, alive, prefix, vit.cls_token is not None)
        keep = decide(score.detach(), alive, group) & alive
        if vit.global_pool != "token":
            for b in range(len(keep)):
                if not keep[b].any():
                    keep[b, score[b].masked_fill(~alive[b], -1).argmax()] = True
        alive = keep
        tokens = torch.cat([torch.ones(len(alive), prefix, dtype=torch.bool), alive], 1)
        for i in blocks:
            x = run_block(vit, i, x, rope, tokens[:, None, None, :])
        scores.append(score)
        kept.append(keep)
    # timm's head, image by image, on the living tokens
    logits = torch.cat([vit.forward_head(vit.norm(x[b : b + 1, tokens[b]])) for b in range(len(x))])
    return logits, torch.stack(scores), torch.stack(kept)
