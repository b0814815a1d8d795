"""
Linear, Conv2d and LayerNorm whose parameters stay fp32 and are cast to the dtype of what comes in. The compute dtype is
thereby chosen once, where pixels and embeddings enter the model, and nothing else has to know of it (no autocast).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


def _to(p, x):
    return None if p is None else p.to(x.dtype)


class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), _to(self.bias, x))


class Conv2d(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight.to(x.dtype), _to(self.bias, x), self.stride, self.padding)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def trunc_normal_linears(module, std=0.02):
    """ViT initialisation for every Linear and Conv2d below `module`; biases start at zero."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
