"""The ops of attention with dropout, told who serves their calls. Most calls have none: imported by the first."""

from __future__ import annotations

from fagen.dispatch.attention import build_ahead, kernel_of
from fagen.runtime import dropout_ops

dropout_ops.answer_with(kernel_of, build_ahead)
attend = dropout_ops.attend
