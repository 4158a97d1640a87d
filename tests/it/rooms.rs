//! Compares the imports between rooms (the top-level modules of both crates) with the table in docs/architecture.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

const TABLE: &str = "docs/architecture.md";
/// The name of the pipeline's crate in the column "may import" of a trainer's room.
const PIPELINE: &str = "coffey-pipeline";

/// A row of the table.
struct Row {
    line: usize,
    /// Folders and files, as `src/train/` and `src/random.rs`.
    rooms: Vec<String>,
    may_import: BTreeSet<String>,
}

/// Reads the table with the columns "folder" and "may import".
fn rows(text: &str) -> Vec<Row> {
    let mut lines = (1..).zip(text.lines());
    let cells = |line: &str| line.split('|').map(str::trim).map(str::to_owned).collect();
    let header: Vec<String> = lines
        .find(|(_, line)| line.starts_with("| folder |"))
        .map(|(_, line)| cells(line))
        .expect("a table with a column \"folder\"");
    let column = header.iter().position(|name| name == "may import");
    let column = column.expect("a column \"may import\"");
    let quoted = |cell: &str| -> Vec<String> {
        let parts = cell.split('`').skip(1).step_by(2);
        parts.map(str::to_owned).collect()
    };
    lines
        .skip(1)
        .take_while(|(_, line)| line.starts_with('|'))
        .map(|(number, line)| {
            let cells: Vec<String> = cells(line);
            Row {
                line: number,
                rooms: quoted(&cells[1]),
                may_import: quoted(&cells[column]).into_iter().collect(),
            }
        })
        .collect()
}

/// A source file.
struct File {
    /// The path in the repository.
    path: String,
    /// The folder or file of the room, as the table names it.
    room: String,
    /// The path of the module: `["train", "run"]` for `src/train/run.rs`.
    module: Vec<String>,
    /// The lines of code by number, without comments and tests.
    lines: Vec<(usize, String)>,
    /// The submodules that only tests compile.
    tests: Vec<String>,
}

/// Reads the files below `folder`, the `src` of a crate.
fn files(src: &str, folder: &str, module: &[String]) -> Vec<File> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    let mut entries: Vec<_> = fs::read_dir(root.join(folder))
        .unwrap()
        .map(|entry| entry.unwrap())
        .collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name().into_string().unwrap();
        let path = format!("{folder}/{name}");
        let mut module = module.to_vec();
        if entry.path().is_dir() {
            module.push(name);
            files.extend(self::files(src, &path, &module));
            continue;
        }
        match name.strip_suffix(".rs") {
            None => continue,
            Some("lib" | "main") if module.is_empty() => continue,
            Some("mod") => {}
            Some(stem) => module.push(stem.to_owned()),
        }
        let inside = &path[src.len() + 1..];
        let room = match inside.split_once('/') {
            Some((room, _)) => format!("{src}/{room}/"),
            None => path.clone(),
        };
        let text = fs::read_to_string(entry.path()).unwrap();
        let (lines, tests) = code(&text);
        files.push(File {
            path,
            room,
            module,
            lines,
            tests,
        });
    }
    files
}

/// The lines of code without comments and without items that only tests compile, and the names of such modules in other files.
///
/// rustfmt puts the closing brace of an item at the item's indentation.
fn code(text: &str) -> (Vec<(usize, String)>, Vec<String>) {
    let (mut code, mut modules) = (Vec::new(), Vec::new());
    let mut lines = (1..).zip(text.lines());
    while let Some((number, line)) = lines.next() {
        let attribute = line.trim();
        if !["#[cfg(test)]", "#[cfg(all(test,"]
            .iter()
            .any(|test| attribute.starts_with(test))
        {
            let end = line.find("//").unwrap_or(line.len());
            code.push((number, line[..end].to_owned()));
            continue;
        }
        let indentation = &line[..line.len() - line.trim_start().len()];
        let end = format!("{indentation}}}");
        for (_, line) in lines.by_ref() {
            if let Some(name) = line.trim().strip_suffix(';')
                && let Some((_, name)) = name.split_once("mod ")
            {
                modules.push(name.to_owned());
            }
            let single = line.ends_with(';') && !line[indentation.len()..].starts_with(' ');
            if single || line == end {
                break;
            }
        }
    }
    (code, modules)
}

/// The paths in a line that start at the crate's root, at a parent module, or at the pipeline's crate.
fn paths(line: &str) -> Vec<Vec<&str>> {
    line.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'))
        .map(|path| path.split("::").collect::<Vec<_>>())
        .filter(|path| match path[0] {
            "crate" | "super" => path.len() > 1,
            first => first == "coffey_pipeline",
        })
        .collect()
}

/// The first name below the crate's root in a path, or the pipeline's crate; `None` for a path inside the module's room.
fn target<'a>(path: &[&'a str], module: &[String]) -> Option<&'a str> {
    let ups = path.iter().take_while(|part| **part == "super").count();
    match path[0] {
        "coffey_pipeline" => Some(PIPELINE),
        "crate" => Some(path[1]),
        _ if ups == module.len() => Some(path[ups]),
        _ => None,
    }
}

/// The items that a crate's root exports from its rooms: the room of each item.
fn exports(src: &str) -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join(src).join("lib.rs")).unwrap();
    let statements = text.split(';').filter_map(|s| s.split_once("pub use "));
    let mut exports = BTreeMap::new();
    for (_, statement) in statements {
        let mut names = statement
            .split(|c: char| !(c.is_alphanumeric() || c == '_'))
            .filter(|name| !name.is_empty() && *name != "crate");
        let room = names.next().unwrap();
        exports.extend(names.map(|name| (name.to_owned(), room.to_owned())));
    }
    exports
}

/// The name of a room in paths: `train` for `src/train/`.
fn name(room: &str) -> &str {
    let last = room.trim_end_matches('/').rsplit('/').next().unwrap();
    last.trim_end_matches(".rs")
}

/// Returns the faults of one crate, and adds its imports to `imports` by the row's line.
fn check(
    src: &str,
    rows: &[Row],
    imports: &mut BTreeMap<usize, BTreeSet<String>>,
) -> BTreeSet<String> {
    let files = files(src, src, &[]);
    let exports = exports(src);
    let rooms: BTreeSet<&str> = files.iter().map(|file| name(&file.room)).collect();
    let tests: Vec<Vec<String>> = files
        .iter()
        .flat_map(|file| {
            let modules = file.tests.iter();
            modules.map(|test| [&file.module[..], std::slice::from_ref(test)].concat())
        })
        .collect();
    let mut faults = BTreeSet::new();
    for file in &files {
        if tests.iter().any(|test| file.module.starts_with(test)) {
            continue;
        }
        let Some(row) = rows.iter().find(|row| row.rooms.contains(&file.room)) else {
            faults.insert(format!("{TABLE} has no row for `{}`", file.room));
            continue;
        };
        for (number, line) in &file.lines {
            for path in paths(line) {
                let place = format!("{}:{number}", file.path);
                let Some(target) = target(&path, &file.module) else {
                    continue;
                };
                let target = exports.get(target).map_or(target, String::as_str);
                if target == name(&file.room) {
                    continue;
                }
                if target != PIPELINE && !rooms.contains(target) {
                    faults.insert(format!(
                        "{place}: `{}` names no room; write one `use` for each room",
                        path.join("::")
                    ));
                    continue;
                }
                let row_imports = imports.entry(row.line).or_default();
                row_imports.insert(target.to_owned());
                if !row.may_import.contains(target) {
                    faults.insert(format!(
                        "{place} imports `{target}`, which the row of `{}` ({TABLE}:{}) does not allow; \
                         remove the import, or add `{target}` to the column \"may import\"",
                        file.room, row.line
                    ));
                }
            }
        }
    }
    let there: BTreeSet<&str> = files.iter().map(|file| file.room.as_str()).collect();
    let listed = rows.iter().flat_map(|row| &row.rooms);
    let of_crate = listed.filter(|room| room.starts_with(&format!("{src}/")));
    for room in of_crate.filter(|room| !there.contains(room.as_str())) {
        faults.insert(format!(
            "{TABLE} has a row for `{room}`, which is not there"
        ));
    }
    faults
}

#[test]
fn rooms_import_what_the_architecture_allows() {
    let table = Path::new(env!("CARGO_MANIFEST_DIR")).join(TABLE);
    let rows = rows(&fs::read_to_string(table).unwrap());
    let mut imports = BTreeMap::new();
    let mut faults = check("src", &rows, &mut imports);
    faults.extend(check("pipeline/src", &rows, &mut imports));
    for row in &rows {
        let imported = imports.remove(&row.line).unwrap_or_default();
        for room in row.may_import.difference(&imported) {
            faults.insert(format!(
                "{TABLE}:{}: `{}` may import `{room}` and does not; remove `{room}` from the row",
                row.line,
                row.rooms.join("`, `")
            ));
        }
        if row.may_import != imported {
            let imported: Vec<_> = imported.into_iter().collect();
            faults.insert(format!(
                "{TABLE}:{}: the source imports `{}`",
                row.line,
                imported.join("`, `")
            ));
        }
    }
    let faults: Vec<_> = faults.into_iter().collect();
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}
