//! One operation, measured over every combination of dirty memory and concurrency.

use std::collections::BTreeMap;

use futures::future::try_join_all;

use super::{
    guest::Guest,
    machine::machine,
    operations::{Operation, Sample},
    peers,
    report::{Cell, Report},
    summary::Summary,
};
use crate::{
    cli::{BenchMatrix, Global},
    client::Client,
    error::Error,
    output,
};

pub(super) async fn run<O: Operation>(
    global: &Global,
    options: BenchMatrix,
    _: O,
) -> Result<(), Error> {
    let client = crate::commands::client(global)?;
    let server = machine(&client).await?;
    let cells = options.dirty.len() * options.concurrency.len();
    let bar = indicatif::ProgressBar::new(cells as u64);
    if global.json {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    let room = room(&client, &options.template).await?;
    let mut report = Report::new::<O>(&options, server);
    for &concurrency in &options.concurrency {
        for &dirty in &options.dirty {
            let cell = if u64::from(dirty) > room {
                let why = format!("a sandbox of `{}` has room for {room} MB", options.template);
                Cell::skipped(dirty, concurrency, why)
            } else {
                cell::<O>(&client, &options, dirty, concurrency).await?
            };
            report.cells.push(cell);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    if !options.no_peers {
        report.peers = Some(peers::measure(&client, &options, &global.data_dir).await?);
    }
    if global.json {
        output::print_json(&report);
    } else {
        report.print();
    }
    Ok(())
}

/// MB that a sandbox of this template can write into its memory.
async fn room(client: &Client, template: &str) -> Result<u64, Error> {
    let guest = Guest::create(client, template).await?;
    let room = guest.room_mb(client).await;
    guest.kill(client).await?;
    room
}

/// Measures one combination on sandboxes of its own, and removes them whatever happens.
async fn cell<O: Operation>(
    client: &Client,
    options: &BenchMatrix,
    dirty: u32,
    concurrency: u32,
) -> Result<Cell, Error> {
    let mut guests = Vec::new();
    let outcome = async {
        for _ in 0..O::guests(concurrency) {
            guests.push(Guest::create(client, &options.template).await?);
        }
        rounds::<O>(client, options, &guests, dirty, concurrency).await
    }
    .await;
    let removed = try_join_all(guests.iter().map(|guest| guest.remove(client))).await;
    let cell = outcome?;
    removed.map(|_| cell)
}

async fn rounds<O: Operation>(
    client: &Client,
    options: &BenchMatrix,
    guests: &[Guest],
    dirty: u32,
    concurrency: u32,
) -> Result<Cell, Error> {
    let prepare = guests.iter().map(|guest| async {
        guest.room_mb(client).await?;
        O::prepare(client, guest).await
    });
    let mut states = try_join_all(prepare).await?;
    let rounds = options.count.div_ceil(O::guests(concurrency));
    let mut samples: Vec<Sample> = Vec::new();
    let mut walls = Vec::new();
    for round in 0..options.warm_up + rounds {
        try_join_all(guests.iter().map(|guest| guest.dirty(client, dirty))).await?;
        let operate = guests
            .iter()
            .zip(&mut states)
            .map(|(guest, state)| O::operate(client, guest, state, concurrency));
        let mut round_samples = try_join_all(operate).await?;
        let wall = wall(&round_samples);
        let follow = guests
            .iter()
            .zip(&mut states)
            .zip(&mut round_samples)
            .map(|((guest, state), sample)| O::follow(client, guest, state, sample));
        try_join_all(follow).await?;
        if round >= options.warm_up {
            walls.push(wall);
            samples.append(&mut round_samples);
        }
    }
    Ok(summarise(dirty, concurrency, samples, walls))
}

/// From the first call's begin to the last one's end, in milliseconds.
fn wall(samples: &[Sample]) -> f64 {
    let began = samples.iter().map(|sample| sample.call.0).min();
    let ended = samples.iter().map(|sample| sample.call.1).max();
    let span = ended.zip(began).map(|(ended, began)| ended - began);
    span.unwrap_or_default().as_secs_f64() * 1e3
}

fn summarise(dirty: u32, concurrency: u32, samples: Vec<Sample>, walls: Vec<f64>) -> Cell {
    let n = samples.len();
    let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut phases: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut tiers: BTreeMap<String, usize> = BTreeMap::new();
    for sample in samples {
        for (name, value) in sample.values {
            values.entry(name.to_owned()).or_default().push(value);
        }
        for phase in sample.phases {
            phases.entry(phase.name).or_default().push(phase.ms);
        }
        if let Some(tier) = sample.tier {
            *tiers.entry(tier).or_default() += 1;
        }
    }
    values.insert("wallMs".to_owned(), walls);
    let of = |sets: BTreeMap<String, Vec<f64>>| {
        sets.into_iter()
            .filter_map(|(name, set)| Some((name, Summary::of(set)?)))
            .collect()
    };
    Cell {
        dirty_mb: dirty,
        concurrency,
        n,
        values: of(values),
        phases_ms: of(phases),
        tiers,
        skipped: None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::client::snapshots::Phase;

    #[test]
    fn samples_are_gathered_by_name() {
        let now = Instant::now();
        let after = |ms| now + Duration::from_millis(ms);
        let sample = |ms: f64, tier: &str| Sample {
            call: (now, now),
            values: vec![
                ("callMs", ms),
                ("firstCommandMs", ms * 2.0),
                ("firstCommandMs", ms * 3.0),
            ],
            phases: vec![Phase {
                name: "stop".into(),
                ms: 1.0,
            }],
            tier: Some(tier.to_owned()),
        };
        let samples = vec![sample(10.0, "full"), sample(20.0, "soft_dirty")];
        let cell = summarise(50, 2, samples, vec![21.0]);
        assert_eq!((cell.n, cell.values["callMs"].n), (2, 2));
        assert_eq!(cell.values["firstCommandMs"].n, 4);
        assert_eq!(cell.values["firstCommandMs"].max, 60.0);
        assert_eq!(cell.values["wallMs"].p50, 21.0);
        assert_eq!(cell.phases_ms["stop"].n, 2);
        assert_eq!(cell.tiers.len(), 2);
        let mut both = [sample(1.0, "full"), sample(1.0, "full")];
        both[0].call = (now, after(30));
        both[1].call = (after(10), after(50));
        assert_eq!(wall(&both), 50.0);
    }
}
