//! Latents by several processes.

use super::*;

#[test]
fn latent_manifests_are_joined_by_the_last_process() {
    let (input, alone) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let shards = inputs(input.path());
    let recipe = recipe(TextKind::Embeds);
    precompute(alone.path(), &recipe, &shards, 4, 1);
    for order in [[0, 1], [1, 0]] {
        let output = TempDir::new().unwrap();
        let open = |rank, world| {
            let part = Rank { index: rank, world };
            open(output.path(), recipe.clone(), part, &shards).unwrap()
        };
        let [first, last] = order;
        let mut writer = open(first, 2);
        work(&mut writer, 16, 1);
        let place = coffey_pipeline::Destination::folder(output.path());
        let missing = writer.finish().unwrap().missing;
        let of_last = Rank {
            index: last,
            world: 2,
        };
        assert!(
            missing.iter().eq(shards_of(of_last, &shards)),
            "{missing:?}"
        );
        assert_eq!(join(&place, &shards).unwrap().missing, missing);
        let mut writer = open(last, 2);
        assert_eq!(writer.remaining(), missing);
        work(&mut writer, 16, 1);
        let written = files(output.path());
        assert!(
            written.contains_key("manifest-0-of-2.json") && !written.contains_key("manifest.json")
        );
        // Another process of the same rank, as after a restart that was not one, finds nothing to do.
        assert_eq!(open(last, 2).remaining(), []);
        // One that died while it wrote another shard of the other rank.
        fs::write(output.path().join(".writing-b.tar-abcdef"), "half").unwrap();
        assert!(writer.finish().unwrap().missing.is_empty());
        assert!(files(output.path()) == files(alone.path()), "{order:?}");
        // Whoever comes later leaves it as it is.
        let mut writer = open(0, 3);
        work(&mut writer, 16, 1);
        assert!(writer.finish().unwrap().missing.is_empty());
        assert!(files(output.path()) == files(alone.path()));
    }
}

#[test]
fn latent_writer_accepts_another_number_of_processes() {
    let (input, alone, output) = (
        TempDir::new().unwrap(),
        TempDir::new().unwrap(),
        TempDir::new().unwrap(),
    );
    let shards = inputs(input.path());
    let recipe = recipe(TextKind::Embeds);
    precompute(alone.path(), &recipe, &shards, 4, 1);
    let part = Rank { index: 1, world: 2 };
    let mut writer = open(output.path(), recipe.clone(), part, &shards).unwrap();
    work(&mut writer, 16, 1);
    let writer = open(output.path(), recipe.clone(), Rank::SOLO, &shards).unwrap();
    assert_eq!(writer.remaining(), [shards[0].clone(), shards[2].clone()]);
    drop(writer);
    precompute(output.path(), &recipe, &shards, 16, 1);
    assert!(files(output.path()) == files(alone.path()));
    // With fewer inputs nothing that is there is forgotten.
    precompute(output.path(), &recipe, &shards[..1], 16, 1);
    assert!(files(output.path()) == files(alone.path()));
}

#[test]
fn latent_max_samples_depend_on_the_number_of_processes() {
    let (input, output) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let shards = inputs(input.path());
    let recipe = |world| {
        let mut recipe = recipe(TextKind::Embeds);
        recipe.selection.max_samples = Some(6);
        recipe.selection.world = Some(world);
        recipe
    };
    for rank in [0, 1] {
        let mut writer = open(
            output.path(),
            recipe(2),
            Rank {
                index: rank,
                world: 2,
            },
            &shards,
        )
        .unwrap();
        work(&mut writer, 16, 1);
        // Three samples of a.tar are the share of the first: c.tar is not missing.
        let missing = writer.finish().unwrap().missing;
        assert_eq!(missing.is_empty(), rank == 1, "{missing:?}");
    }
    let names: Vec<String> = files(output.path()).into_keys().collect();
    assert_eq!(
        names,
        ["a.tar", "b.tar", "manifest.json", "skipped/b.tar.jsonl"]
    );
    let error = open(
        output.path(),
        recipe(3),
        Rank { index: 0, world: 3 },
        &shards,
    )
    .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("selection.world = 2, and now it is 3"),
        "{error}"
    );
}

#[test]
fn latent_entries_that_differ_are_checked_by_sha256() {
    let (input, output) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let shards = inputs(input.path());
    let recipe = recipe(TextKind::Embeds);
    precompute(output.path(), &recipe, &shards, 4, 1);
    let whole = files(output.path());
    let mut other = manifest(output.path());
    other.shards.get_mut("a.tar").unwrap().sha256 = "0".repeat(64);
    for name in ["manifest-0-of-2.json", "manifest-1-of-2.json"] {
        let text = serde_json::to_vec(&other).unwrap();
        fs::write(output.path().join(name), text).unwrap();
    }
    let place = coffey_pipeline::Destination::folder(output.path());
    assert!(join(&place, &shards).unwrap().missing.is_empty());
    assert!(files(output.path()) == whole);
}
