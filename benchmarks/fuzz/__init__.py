"""Random programs that mix what real ones do, and the laws that cast insertion keeps on all of them."""
