//! One opening of one image, step by step.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use super::disk::{Lock, Temporary};
use super::{FORMAT, Image, OpenOptions, PARALLEL, PullPolicy, Store, StoreError};
use crate::archive::{self, ArchiveError, Blob, Found};
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::erofs::{self, Contents};
use crate::layer::Applier;
use crate::manifest::Descriptor;
use crate::progress::{Event, Progress};
use crate::pull::{PullError, Registry};
use crate::reference::Reference;
use crate::rootdir::{RootDir, RootDirError};
use crate::tree::Tree;

/// What all steps of one opening share.
pub(super) struct Opening<'a> {
    pub(super) store: &'a Store,
    pub(super) name: String,
    pub(super) options: &'a OpenOptions,
}

impl Opening<'_> {
    pub(super) fn archive_error(&self, source: ArchiveError) -> StoreError {
        StoreError::Archive { name: self.name.clone(), source: Box::new(source) }
    }

    fn pull_error(&self, source: PullError) -> StoreError {
        StoreError::Pull { name: self.name.clone(), source: Box::new(source) }
    }

    fn rootdir_error(&self, source: RootDirError) -> StoreError {
        StoreError::RootDir { name: self.name.clone(), source: Box::new(source) }
    }

    /// The image as this source calls it.
    fn done(&self, mut image: Image, cached: bool, progress: &mut dyn Progress) -> Image {
        progress.event(Event::Ready { key: &image.key, bytes: image.bytes, cached });
        image.name.clone_from(&self.name);
        image
    }

    pub(super) fn registry(
        mut self,
        reference: &Reference,
        progress: &mut dyn Progress,
    ) -> Result<Image, StoreError> {
        self.name = reference.to_string();
        let what = format!("registry {reference}");
        if self.options.pull != PullPolicy::Always
            && let Some(image) = self.store.seen(&what)
        {
            return Ok(self.done(image, true, progress));
        }
        if self.options.pull == PullPolicy::Never {
            return Err(StoreError::NotCached { name: self.name });
        }
        progress.event(Event::Resolving { name: &self.name });
        let limits = &self.options.limits;
        let registry =
            Registry::new(reference, limits, self.options.insecure).map_err(|e| self.pull_error(e))?;
        let resolved = registry.resolve().map_err(|e| self.pull_error(e))?;
        let config = self.config(&resolved.config, resolved.layers.len())?;
        let key = Digest::of(&resolved.config);
        let image = self.make(key.hex(), progress, |progress| {
            let blobs = self.fetch(&registry, &resolved.layers, progress)?;
            let made = self.apply_layers(key.hex(), &config, &blobs, progress);
            if made.is_err() {
                // A layer that cannot be applied is not worth keeping, and a damaged one on disk
                // must not be the reason of the next failure.
                for layer in &resolved.layers {
                    fs::remove_file(self.store.blob_path(&layer.digest)).ok();
                }
            }
            made
        })?;
        self.store.remember(&what, &image.key)?;
        Ok(image)
    }

    /// Opens the layers, fetching those that are not in the store, some at a time.
    fn fetch(
        &self,
        registry: &Registry<'_>,
        layers: &[Descriptor],
        progress: &mut dyn Progress,
    ) -> Result<Vec<Blob>, StoreError> {
        let next = AtomicUsize::new(0);
        let (sender, receiver) = mpsc::channel();
        let mut blobs: Vec<Option<Blob>> = vec![None; layers.len()];
        std::thread::scope(|scope| {
            for _ in 0..PARALLEL.min(layers.len()) {
                let (sender, next) = (sender.clone(), &next);
                scope.spawn(move || {
                    while let Some((index, layer)) = take_next(next, layers) {
                        let told = |done| {
                            if done < layer.size {
                                sender.send((index, Fetched::Part(done))).unwrap_or_default();
                            }
                        };
                        let blob = self.fetch_one(registry, layer, told);
                        let failed = blob.is_err();
                        let sent = sender.send((index, Fetched::Whole(Box::new(blob))));
                        if failed || sent.is_err() {
                            // The others end after the layer they are at.
                            next.store(layers.len(), Ordering::Relaxed);
                        }
                    }
                });
            }
            drop(sender);
            let mut first_error = None;
            for (index, fetched) in receiver {
                let total = layers[index].size;
                let done = match fetched {
                    Fetched::Part(done) => done,
                    Fetched::Whole(blob) => match *blob {
                        Ok(blob) => {
                            blobs[index] = Some(blob);
                            total
                        }
                        Err(error) => {
                            first_error.get_or_insert(error);
                            continue;
                        }
                    },
                };
                progress.event(Event::Download {
                    index,
                    count: layers.len(),
                    digest: &layers[index].digest,
                    done,
                    total,
                });
            }
            match first_error {
                Some(error) => Err(error),
                None => Ok(blobs.into_iter().flatten().collect()),
            }
        })
    }

    fn fetch_one(
        &self,
        registry: &Registry<'_>,
        layer: &Descriptor,
        told: impl Fn(u64),
    ) -> Result<Blob, StoreError> {
        let path = self.store.blob_path(&layer.digest);
        let open = || File::open(&path).and_then(|file| Blob::of_file(file, Some(layer.digest.clone())));
        if let Ok(blob) = open() {
            return Ok(blob);
        }
        let temporary = || self.store.disk.temporary();
        let fetched = registry.blob(layer, temporary, told).map_err(|e| self.pull_error(e))?;
        // From the open file: the one in the store may be removed at any time.
        let blob = fetched.file().try_clone();
        let blob = blob.and_then(|file| Blob::of_file(file, Some(layer.digest.clone())));
        fetched.publish(&path).map_err(|e| self.store.disk_error(e))?;
        blob.map_err(|e| self.store.disk_error(e))
    }

    pub(super) fn tar(
        &self,
        path: &Path,
        pick: Option<&str>,
        progress: &mut dyn Progress,
    ) -> Result<Image, StoreError> {
        let read_error = |source| self.archive_error(ArchiveError::Read { path: path.to_owned(), source });
        // The same file, as far as the file system can tell.
        let meta = fs::metadata(path).map_err(read_error)?;
        let absolute = fs::canonicalize(path).map_err(read_error)?;
        let what = format!(
            "archive {} {:?} {} {} {} {}.{} {}.{}",
            absolute.display(),
            pick,
            meta.dev(),
            meta.ino(),
            meta.size(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec(),
        );
        if let Some(image) = self.store.seen(&what) {
            return Ok(self.done(image, true, progress));
        }
        // Dropped at the end of this function, when nobody reads from it any more.
        let mut plain = None;
        let found = archive::open_tar(path, pick, &self.options.limits, || {
            let temporary = self.store.disk.temporary()?;
            let file = temporary.file().try_clone()?;
            plain = Some(temporary);
            Ok(file)
        });
        let found = found.map_err(|e| self.archive_error(e))?;
        let image = self.found(&found, progress)?;
        self.store.remember(&what, &image.key)?;
        Ok(image)
    }

    pub(super) fn found(&self, found: &Found, progress: &mut dyn Progress) -> Result<Image, StoreError> {
        let config = self.config(&found.config, found.layers.len())?;
        let key = Digest::of(&found.config);
        let mut named = Opening { store: self.store, name: self.name.clone(), options: self.options };
        // The name that the image has for itself, where that is a whole one and not just a tag.
        if let Some(name) = found.name.as_ref().filter(|n| n.contains(['/', ':'])) {
            named.name.clone_from(name);
        }
        named.make(key.hex(), progress, |progress| {
            named.apply_layers(key.hex(), &config, &found.layers, progress)
        })
    }

    pub(super) fn directory(&self, path: &Path, progress: &mut dyn Progress) -> Result<Image, StoreError> {
        let path = fs::canonicalize(path)
            .map_err(|source| self.rootdir_error(RootDirError::Read { path: path.to_owned(), source }))?;
        progress.event(Event::Walk { path: &path });
        let dir = RootDir { path: &path, except: self.store.disk.root(), limits: &self.options.limits };
        let before = dir.fingerprint().map_err(|e| self.rootdir_error(e))?;
        self.make(before.hex(), progress, |_| {
            let temporary = self.temporary()?;
            let mut contents = self.contents(&temporary)?;
            let tree = dir.read(&mut contents).map_err(|e| self.rootdir_error(e))?;
            if dir.fingerprint().map_err(|e| self.rootdir_error(e))? != before {
                return Err(self.rootdir_error(RootDirError::Changed { path: path.clone() }));
            }
            self.publish(before.hex(), &ImageConfig::default(), temporary, contents, &tree)
        })
    }

    /// The configuration, checked against this host and against the number of layers.
    fn config(&self, json: &[u8], layers: usize) -> Result<ImageConfig, StoreError> {
        let config = ImageConfig::parse(json)
            .map_err(|source| StoreError::Config { name: self.name.clone(), source })?;
        let described = config.diff_ids().map_or(0, |ids| ids.len());
        if described != layers || config.rootfs.diff_ids.len() != layers {
            return Err(StoreError::Layers { name: self.name.clone(), described, actual: layers });
        }
        Ok(config)
    }

    /// Takes the key's lock and makes the image, unless it is there then.
    fn make(
        &self,
        key: &str,
        progress: &mut dyn Progress,
        make: impl FnOnce(&mut dyn Progress) -> Result<Image, StoreError>,
    ) -> Result<Image, StoreError> {
        if let Some(image) = self.store.ready(key) {
            return Ok(self.done(image, true, progress));
        }
        let _lock = self.lock(key, progress)?;
        if let Some(image) = self.store.ready(key) {
            return Ok(self.done(image, true, progress));
        }
        let image = make(progress)?;
        Ok(self.done(image, false, progress))
    }

    fn lock(&self, key: &str, progress: &mut dyn Progress) -> Result<Lock, StoreError> {
        let wait = self.options.wait;
        let lock = self.store.disk.lock(key, wait, || progress.event(Event::Waiting { key }));
        lock.map_err(|e| self.store.disk_error(e))?
            .ok_or_else(|| StoreError::Busy { name: self.name.clone(), seconds: wait.as_secs() })
    }

    fn temporary(&self) -> Result<Temporary, StoreError> {
        self.store.disk.temporary().map_err(|e| self.store.disk_error(e))
    }

    fn contents(&self, temporary: &Temporary) -> Result<Contents, StoreError> {
        let file = temporary.file().try_clone().map_err(|e| self.store.disk_error(e))?;
        Ok(Contents::new(file))
    }

    fn apply_layers(
        &self,
        key: &str,
        config: &ImageConfig,
        blobs: &[Blob],
        progress: &mut dyn Progress,
    ) -> Result<Image, StoreError> {
        let temporary = self.temporary()?;
        let mut contents = self.contents(&temporary)?;
        let mut applier = Applier::new(&mut contents, &self.options.limits);
        let count = blobs.len();
        let diff_ids = config.diff_ids().unwrap_or_default();
        for (index, (blob, diff_id)) in blobs.iter().zip(&diff_ids).enumerate() {
            progress.event(Event::Apply { index, count });
            let applied = applier.apply(blob.reader(), blob.digest.as_ref(), diff_id);
            applied.map_err(|source| StoreError::Layer {
                name: self.name.clone(),
                number: index + 1,
                count,
                digest: blob.digest.as_ref().unwrap_or(diff_id).clone(),
                source: Box::new(source),
            })?;
        }
        let tree = applier.into_tree();
        self.publish(key, config, temporary, contents, &tree)
    }

    /// Finishes the image file and makes it appear, the record last.
    fn publish(
        &self,
        key: &str,
        config: &ImageConfig,
        temporary: Temporary,
        contents: Contents,
        tree: &Tree,
    ) -> Result<Image, StoreError> {
        let failed = |e| self.store.disk_error(e);
        let mut uuid = [0; 16];
        for (byte, pair) in uuid.iter_mut().zip(key.as_bytes().chunks_exact(2)) {
            let text = std::str::from_utf8(pair).unwrap_or_default();
            *byte = u8::from_str_radix(text, 16).unwrap_or_default();
        }
        let bytes = erofs::write(contents, tree, uuid).map_err(failed)?;
        let root = self.store.disk.path("images", &format!("{key}.erofs"));
        temporary.publish(&root).map_err(failed)?;
        let image = Image {
            name: self.name.clone(),
            key: key.to_owned(),
            bytes,
            created: std::time::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_secs()),
            config: config.clone(),
            format: FORMAT,
            root,
        };
        let record = image.root.with_extension("json");
        let json = serde_json::to_vec_pretty(&image).map_err(|e| failed(e.into()))?;
        self.store.disk.write(&record, &json).map_err(failed)?;
        Ok(image)
    }
}

/// News of one layer.
enum Fetched {
    Part(u64),
    Whole(Box<Result<Blob, StoreError>>),
}

fn take_next<'a>(next: &AtomicUsize, layers: &'a [Descriptor]) -> Option<(usize, &'a Descriptor)> {
    let index = next.fetch_add(1, Ordering::Relaxed);
    layers.get(index).map(|layer| (index, layer))
}
