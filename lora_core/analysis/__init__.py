"""What can be computed from adapters as they are: sums of them, merged bases, plain forms of other kinds."""
