"""Networks that other people's packages define, with random weights: is gradkern right on them, and is it slower?

    make zoo                                    # prepares an environment of its own, measures, writes docs/zoo.md
    python -m benchmarks.zoo --only timm/       # some of them, in an environment that has the packages
    python -m benchmarks.zoo --quick            # networks of torch alone, a few rounds

Every network runs in a process of its own with a time limit.  A result that is already there is not measured again.
"""
