//! The metadata service of a machine (MMDS).
