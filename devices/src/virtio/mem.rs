//! Pluggable memory (VIRTIO 1.2 section 5.15).

/// What pluggable memory says of itself.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MemoryReport {}
