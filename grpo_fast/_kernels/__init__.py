"""Everything that becomes machine code, and only that. From above it imports nothing but `terms`.

Each file stands on those before it::

    compiling  cache  threads     how kernels are compiled, where machine code is kept, on how many threads it runs
    simd  elementary  exact       a vector type; exp, log and k3 of vectors; sums without rounding
    blocks  sums                  a task's blocks, their runs, the scratch array; what is added up, by name
    roof                          reading four arrays and nothing else, to compare with

    samples                       probabilities: reading them; the sums of a run
    sample_blocks  sweep_blocks   … of all, for one ε (`grpo_objective`, `grpo_stats`), or for many (`grpo_sweep`)

    formulas                      log-probabilities: s, k and their slopes, picked by the class of the option
    tokens                        which tokens count; reading them; writing their gradient
    token_level  sequence_level   a block → sums and gradient; or collect → ρ → gradient (`grpo_loss`)

The formula and the gradient of an option are in `formulas`, side by side, and nowhere else in machine code. A new
surrogate is a class in `terms`, its mathematics in `reference`, and a branch in each function of `formulas` that asks
for the class of the surrogate; tests/combinations.py then tries it with everything else.

A lane is one number of a vector, a vector 64 bytes, a run 16 vectors, a block 4096 samples or tokens of one sequence.
Sums are rounded within a block, always in the same order, and exact beyond it: hence the same bits for any number of
threads and, since a sequence begins its own blocks, in any batch. Where numbers leave the range in which the fast way
is right, a block is computed again in the careful way. An illegal number is not looked for: it makes a sum infinite or
NaN, the block is counted as suspect, and Python looks for the number and raises an error that names it.
"""
