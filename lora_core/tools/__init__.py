"""Operations on adapters as they are: spectra, merging, shrinking, extracting, comparing."""
