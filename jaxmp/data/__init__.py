"""Datasets, and the pipeline that feeds them to a train step.

A row goes through these stages, in this order. Each but the first is optional.

1. `Dataset.source(split)` reads rows: a dict of NumPy arrays, rows along axis 0. Columns may hold text or objects.
2. `Dataset.host_transforms`, functions `rows -> rows`, run on the host in NumPy. They may turn text into numbers.
3. Columns that hold no numbers that JAX has (text, objects, times, records) are left out. The others go to the
   device, with "weight", float32 (rows,): 1 for a row, 0 for padding.
4. `Images` scales and normalises its image columns and, in training, augments them.
5. `Dataset.transforms`, pure functions `(key, row) -> row`, run on the device, compiled with the train step. Each is
   called for one example: a dict of arrays without the leading axis. In training `key` is a JAX key for this transform
   and this example, drawn from the step's key and the example's place in the whole batch, so that the draws do not
   depend on the number of devices. In evaluation `key` is None: one function can normalise always and augment only in
   training. A transform returns the whole row, with "weight" in it.

       def normalise_and_add_noise(key, row):
           x = (row["x"] - 3.0) / 2.0
           if key is not None:
               x += 0.1 * jax.random.normal(key, x.shape)
           return {**row, "x": x}

What a host transform gives for a row must not depend on the other rows it is called with: it is called with a batch, or
with the whole split, from several threads if the source is `thread_safe` (arrays are) and, if `workers` > 0, in other
processes.
"""
