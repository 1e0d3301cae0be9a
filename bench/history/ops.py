"""A few calls that users make, at sizes that fit into the second-level cache, into the last one, and into neither."""

import numpy as np

import pyreg

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = np.float16

DTYPES = {"float32": np.float32, "bfloat16": bfloat16}


class Dropout:
    params = ([16, 65_536, 1_000_000, 16_000_000], ["float32", "bfloat16"], ["philox", "threefry"])
    param_names = ("elements", "dtype", "impl")

    def setup(self, elements, dtype, impl):
        self.x = np.ones(elements, DTYPES[dtype])
        self.out = np.ones_like(self.x)

    def time_out(self, elements, dtype, impl):
        pyreg.dropout(self.x, 0.1, key=1, impl=impl, out=self.out)

    def time_fresh(self, elements, dtype, impl):
        pyreg.dropout(self.x, 0.1, key=1, impl=impl)


class Mask:
    params = (["philox", "threefry"],)
    param_names = ("impl",)

    def setup(self, impl):
        pass

    def time_mask(self, impl):
        pyreg.dropout_mask(1_000_000, 0.1, key=1, impl=impl)


class BatchNorm:
    SHAPES = (((128, 1024), -1), ((32, 14, 14, 256), -1), ((32, 256, 14, 14), 1), ((32, 64, 56, 56), 1))
    params = (SHAPES, ["float32", "bfloat16"])
    param_names = ("shape and axis", "dtype")

    def setup(self, shape_and_axis, dtype):
        shape, self.axis = shape_and_axis
        self.x = np.random.default_rng(0).standard_normal(shape, np.float32).astype(DTYPES[dtype])
        self.out = np.ones_like(self.x)
        _, self.mean, self.var = pyreg.batch_norm(self.x, axis=self.axis)

    def time_forward(self, shape_and_axis, dtype):
        pyreg.batch_norm(self.x, axis=self.axis, out=self.out)

    def time_inference(self, shape_and_axis, dtype):
        pyreg.batch_norm_inference(self.x, self.mean, self.var, axis=self.axis, out=self.out)

    def time_backward(self, shape_and_axis, dtype):
        pyreg.batch_norm_backward(self.x, self.x, self.mean, self.var, axis=self.axis, out=self.out)
