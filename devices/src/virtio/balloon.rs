//! The balloon device (VIRTIO 1.2 section 5.5).

/// What a balloon says of itself.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BalloonReport {}
