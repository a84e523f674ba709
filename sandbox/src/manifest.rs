//! # Manifests and indexes
//!
//! The few fields that matter of the OCI image manifest and index and of Docker's schema 2
//! manifest and list, which have the same shape. Which of the two a document is follows from
//! its content (`layers` or `manifests`), not from the media type it came under: archives and
//! old registries get those wrong.

use serde::Deserialize;

use crate::config::host_architecture;
use crate::digest::Digest;
use crate::limits::Limits;

/// The media types asked for, in the form of an `Accept` header.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// Why a manifest cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or without what a manifest must have.
    #[error("The manifest cannot be read: {0}")]
    Syntax(String),
    /// Docker's format before 2016.
    #[error("The manifest has the old format 'schema 1': push the image again with a newer program")]
    Schema1,
    /// A digest that is none, or of another algorithm.
    #[error("The manifest names '{0}', which is no sha256 digest")]
    Digest(String),
    /// No image for this host.
    #[error("The image is not made for {wanted}, only for {available}")]
    Platform {
        /// What is needed.
        wanted: String,
        /// What there is.
        available: String,
    },
    /// More layers or bytes than allowed.
    #[error("The image has {actual} {what}; the limit is {limit}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much there is.
        actual: u64,
        /// The limit.
        limit: u64,
    },
}

/// A pointer to content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub digest: Digest,
    pub size: u64,
}

/// What a document turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Manifest {
    /// One image: its configuration and its layers, lowest first.
    Image { config: Descriptor, layers: Vec<Descriptor> },
    /// A choice of images; these are the ones for this host, best first.
    Index(Vec<IndexEntry>),
}

/// One image of an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IndexEntry {
    pub descriptor: Descriptor,
    /// The name annotation of OCI layouts.
    pub name: Option<String>,
}

#[derive(Deserialize)]
struct Document {
    #[serde(rename = "schemaVersion")]
    schema: Option<u32>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
struct RawDescriptor {
    digest: String,
    #[serde(default)]
    size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    variant: Option<String>,
}

impl RawDescriptor {
    fn read(&self) -> Result<Descriptor, ManifestError> {
        let digest = Digest::parse(&self.digest);
        Ok(Descriptor {
            digest: digest.ok_or_else(|| ManifestError::Digest(self.digest.chars().take(100).collect()))?,
            size: self.size,
        })
    }

    fn name(&self) -> Option<String> {
        let annotations = self.annotations.as_ref()?;
        let containerd = annotations.get("io.containerd.image.name");
        annotations.get("org.opencontainers.image.ref.name").or(containerd).cloned()
    }
}

impl Manifest {
    /// Reads a manifest or index.
    pub(crate) fn parse(json: &[u8], limits: &Limits) -> Result<Self, ManifestError> {
        // A JSON array would pass for a structure of defaults.
        if !json.trim_ascii_start().starts_with(b"{") {
            return Err(ManifestError::Syntax("it is no JSON object".into()));
        }
        let document: Document =
            serde_json::from_slice(json).map_err(|e| ManifestError::Syntax(e.to_string()))?;
        if document.schema == Some(1) {
            return Err(ManifestError::Schema1);
        }
        if let Some(entries) = document.manifests {
            return choose(&entries).map(Self::Index);
        }
        let (Some(config), Some(layers)) = (document.config, document.layers) else {
            let text = "it has neither 'manifests' nor 'config' and 'layers'";
            return Err(ManifestError::Syntax(text.into()));
        };
        if layers.len() > limits.layers {
            return Err(ManifestError::Limit {
                what: "layers",
                actual: layers.len() as u64,
                limit: limits.layers as u64,
            });
        }
        let layers: Vec<Descriptor> = layers.iter().map(RawDescriptor::read).collect::<Result<_, _>>()?;
        let total = layers.iter().fold(0u64, |sum, l| sum.saturating_add(l.size));
        if total > limits.download_bytes {
            return Err(ManifestError::Limit {
                what: "bytes in its layers",
                actual: total,
                limit: limits.download_bytes,
            });
        }
        Ok(Self::Image { config: config.read()?, layers })
    }
}

/// The entries for this host, the plainest variant first. Entries that do not say for what they
/// are come last: OCI layouts of one image leave it out.
fn choose(entries: &[RawDescriptor]) -> Result<Vec<IndexEntry>, ManifestError> {
    let wanted = host_architecture();
    let mut chosen = Vec::new();
    for entry in entries {
        let rank = match &entry.platform {
            None => 2,
            Some(p) if p.os == "linux" && p.architecture == wanted => {
                u8::from(!matches!(p.variant.as_deref(), None | Some("" | "v1" | "v8")))
            }
            Some(_) => continue,
        };
        let read = IndexEntry { descriptor: entry.read()?, name: entry.name() };
        chosen.push((rank, read));
    }
    if chosen.is_empty() {
        let names = entries.iter().filter_map(|e| e.platform.as_ref());
        // Build attestations are listed as images for unknown/unknown.
        let names = names.filter(|p| p.os != "unknown").map(|p| format!("{}/{}", p.os, p.architecture));
        let names: Vec<String> = names.take(20).collect();
        return Err(ManifestError::Platform {
            wanted: format!("linux/{wanted}"),
            available: if names.is_empty() { "nothing".into() } else { names.join(", ") },
        });
    }
    chosen.sort_by_key(|(rank, _)| *rank);
    Ok(chosen.into_iter().map(|(_, entry)| entry).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u8) -> String {
        Digest::of(&[n]).to_string()
    }

    fn parse(json: &str) -> Result<Manifest, ManifestError> {
        Manifest::parse(json.as_bytes(), &Limits::default())
    }

    #[test]
    fn the_hosts_platform_is_chosen_from_an_index() {
        let host = host_architecture();
        let entry =
            |n, platform: &str| format!(r#"{{"digest":"{}","size":1,"platform":{platform}}}"#, digest(n));
        let json = format!(
            r#"{{"schemaVersion":2,"manifests":[{},{},{},{}]}}"#,
            entry(1, r#"{"os":"linux","architecture":"s390x"}"#),
            entry(2, &format!(r#"{{"os":"linux","architecture":"{host}","variant":"v3"}}"#)),
            entry(3, &format!(r#"{{"os":"linux","architecture":"{host}"}}"#)),
            entry(4, r#"{"os":"unknown","architecture":"unknown"}"#),
        );
        let Manifest::Index(entries) = parse(&json).unwrap() else {
            panic!("an index was read as an image");
        };
        let chosen: Vec<_> = entries.iter().map(|e| e.descriptor.digest.to_string()).collect();
        assert_eq!(chosen, [digest(3), digest(2)]);
    }

    #[test]
    fn an_index_without_the_hosts_platform_says_what_it_has() {
        let json = format!(
            r#"{{"manifests":[{{"digest":"{}","platform":{{"os":"windows","architecture":"amd64"}}}}]}}"#,
            digest(1)
        );
        let error = parse(&json).unwrap_err().to_string();
        assert!(error.contains("windows/amd64"), "{error}");
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        assert!(matches!(parse("{}"), Err(ManifestError::Syntax(_))));
        assert!(matches!(parse("garbage"), Err(ManifestError::Syntax(_))));
        assert_eq!(parse(r#"{"schemaVersion":1,"fsLayers":[]}"#), Err(ManifestError::Schema1));
        let escape = r#"{"config":{"digest":"sha256:../../x"},"layers":[]}"#;
        assert!(matches!(parse(escape), Err(ManifestError::Digest(_))));
    }

    #[test]
    fn layers_and_bytes_are_capped() {
        let layer = |size| format!(r#"{{"digest":"{}","size":{size}}}"#, digest(1));
        let image = |layers: &[String]| {
            format!(r#"{{"config":{{"digest":"{}"}},"layers":[{}]}}"#, digest(0), layers.join(","))
        };
        assert!(parse(&image(&vec![layer(1); 128])).is_ok());
        assert!(matches!(parse(&image(&vec![layer(1); 129])), Err(ManifestError::Limit { .. })));
        let huge = image(&[layer(u64::MAX), layer(u64::MAX)]);
        assert!(matches!(parse(&huge), Err(ManifestError::Limit { .. })));
    }
}
