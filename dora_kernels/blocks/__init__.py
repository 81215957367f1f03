"""Blocks: DoRA layers that the model calls next to each other, computed by one function.

    mlp         a gated MLP, down(act(gate(x)) ⊙ up(x))
    siblings    layers that share an input
    fuse        the blocks of a model, made and taken back

A block is recognised by what the model does (`layers.probe`), and decides at each call whether it computes it; else its
layers do, each alone. Parameters, their names and what hooks see of the modules around it stay as they are.
"""
