"""The kernels, and how they are compiled, kept and run on threads. Of the rest of the package they import only `terms`.

Each file imports only from lines below its own::

    token_level  sequence_level   log-probabilities: a run → sums and gradient; or collect → ρ → gradient
    rollout                       trainer and sampler: collect → conclude → weights and what is kept
    tokens  runs                  a batch, and which tokens count; where a run is read and its gradient written
    formulas  penalties           s and M, k, and their slopes, picked by the class of the option
    ways                          near, far, careful: how a run is computed, by how far its log-ratios are from 0

    sample_blocks  sweep_blocks   probabilities: all blocks, for one ε (`grpo_objective`, `grpo_stats`), or for many
    samples                       reading them; the sums of a run

    roof                          reading four arrays and nothing else, to compare with
    tasks                         the tasks of a kernel, on one thread or on many
    sums  rollout_sums  blocks    what is added up, by name; blocks, their runs, the scratch array
    exact  elementary             sums without rounding; exp, log and k3 of vectors
    simd  float_mode              a vector type; the processor's floating-point mode, set and given back
    compiling                     how functions become machine code
    own_stack  cache  threads     on a stack that is large enough; keeping that on disk; on how many threads it runs
    cache_folder  notices         where on disk: a folder of the user's alone; what is told: warnings, compiling

A lane is one number of a vector, a vector 64 bytes, a run 16 vectors, a block 4096 samples or tokens of one sequence.
Sums are rounded within a block, always in the same order, and exact beyond it: hence the same bits for any number of
threads and, since a sequence begins its own blocks, in any batch. Where numbers leave the range in which a fast way is
right, a run of tokens, or a block of samples, is computed again in the careful way.

What is masked is 0 for all that follows (`runs.zero_where`), whatever it was. An illegal number elsewhere makes a sum
infinite or NaN, or leaves the range in which the fast ways are right, so that the careful way, which adds up what it
read, is taken; the block is counted as suspect, and Python looks for the number and raises an error that names it.

How to add a surrogate, tests/README.md says. At sequence level it must be linear in A on either side of 0. (Clip and
k3, times ρ or not, also stand in `samples` and `sweep_blocks`, for probabilities.)
"""
