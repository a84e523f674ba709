//! `nacelle images`: the container images that are ready on this host.

use clap::{Args as ClapArgs, Subcommand};
use sandbox::{Image, Store};
use serde::Serialize;

use super::{
    failure::{Failure, Outcome},
    kernel,
    output::{self, Format, Table},
    state::State,
    when,
};

/// List or remove the images that are ready on this host
#[derive(Debug, ClapArgs)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    list: List,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List them (as without a subcommand)
    Ls(List),
    /// Remove images; machines that use them keep them until they end
    Rm(Remove),
}

#[derive(Debug, ClapArgs)]
struct List {
    /// Print keys only
    #[arg(short, long)]
    quiet: bool,
    /// How to print them
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    format: Format,
    /// Print keys whole
    #[arg(long)]
    no_trunc: bool,
}

#[derive(Debug, ClapArgs)]
struct Remove {
    /// Remove images of machines that are still listed, too
    #[arg(short, long)]
    force: bool,
    /// Names, keys or starts of keys
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

/// An image as JSON; keys stay what they are.
#[derive(Debug, Serialize)]
struct Row<'a> {
    name: &'a str,
    key: &'a str,
    created: String,
    bytes: u64,
    path: &'a std::path::Path,
}

/// Lists or removes them.
pub fn run(args: &Args) -> Outcome<u8> {
    let store = Store::new(&kernel::cache_directory())?;
    match &args.action {
        Some(Action::Rm(remove)) => self::remove(&store, remove),
        Some(Action::Ls(list)) => print(&store, list),
        None => print(&store, &args.list),
    }
}

fn print(store: &Store, list: &List) -> Outcome<u8> {
    let images = store.list()?;
    if list.quiet {
        output::print(&images.iter().map(|i| format!("{}\n", key(i, list.no_trunc))).collect::<String>())?;
    } else if list.format == Format::Json {
        output::print_json(&images.iter().map(row).collect::<Vec<_>>())?;
    } else {
        let mut table = Table::new(&["IMAGE", "KEY", "MADE", "SIZE"]);
        for image in &images {
            let key = key(image, list.no_trunc).to_owned();
            table.add([image.name.clone(), key, when::ago(image.created), output::bytes(image.bytes)]);
        }
        output::print(&table.text())?;
    }
    Ok(0)
}

fn row(image: &Image) -> Row<'_> {
    Row {
        name: &image.name,
        key: &image.key,
        created: when::rfc3339(image.created.saturating_mul(1000)),
        bytes: image.bytes,
        path: &image.root,
    }
}

fn key(image: &Image, whole: bool) -> &str {
    if whole { &image.key } else { image.key.get(..12).unwrap_or(&image.key) }
}

fn remove(store: &Store, remove: &Remove) -> Outcome<u8> {
    let state = State::open()?;
    Ok(output::each(&remove.images, |word| {
        let images = store.list()?;
        let image = find(&images, word)?;
        let users = state.machines()?;
        if let Some(user) = users.iter().find(|m| m.record.image_key == image.key).filter(|_| !remove.force) {
            let name = &user.record.name;
            return Err(Failure::new(format!(
                "Image {word} is used by machine {name}; remove that first with 'nacelle rm {name}', or use -f"
            )));
        }
        store.remove(&image.key)?;
        output::print(&format!("{}\n", image.key))
    }))
}

/// The image called `word`: by name, by name without the default tag, by key or its start.
fn find<'a>(images: &'a [Image], word: &str) -> Outcome<&'a Image> {
    let named = |i: &&Image| i.name == word || i.key == word || i.name.strip_suffix(":latest") == Some(word);
    if let Some(found) = images.iter().find(named) {
        return Ok(found);
    }
    let starts = |i: &&Image| !word.is_empty() && i.key.starts_with(word);
    let found: Vec<&Image> = images.iter().filter(starts).collect();
    match found[..] {
        [one] => Ok(one),
        [] => Err(Failure::new(format!("No image is called {word:?}; 'nacelle images' lists them"))),
        _ => {
            let keys: Vec<&str> = found.iter().map(|i| key(i, false)).collect();
            let keys = keys.join(", ");
            Err(Failure::new(format!("{word:?} is the start of several keys: {keys}; give more of it")))
        }
    }
}
