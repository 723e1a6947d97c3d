use serde_json::{Value, json};

use crate::support::Bench;

async fn chart(bench: &Bench, id: &str, code: &str) -> Value {
    let code =
        format!("import matplotlib.pyplot as plt, numpy as np, datetime\n{code}\nplt.show()");
    let lines = bench.run(id, &code).await;
    let results = lines.of("result");
    assert_eq!(results.len(), 1, "{lines:?}");
    assert!(results[0]["png"].as_str().unwrap().len() > 1000);
    assert!(
        results[0]["text"]
            .as_str()
            .unwrap()
            .starts_with("<Figure size")
    );
    assert_eq!(results[0]["extra"], json!({}));
    assert_eq!(results[0]["is_main_result"], false);
    results[0]["chart"].clone()
}

#[tokio::test]
async fn values_come_in_all_their_forms() {
    let bench = Bench::new();
    let id = bench.context("python").await;
    let code = "import pandas as pd\n\
        pd.DataFrame({'a': [1, 2], 'b': [0.5, None], 'd': pd.to_datetime(['2026-01-02', None]), 3: ['x', 'y']})";
    let frame = bench.run(&id, code).await;
    let result = frame.of("result")[0];
    let data =
        json!({"a": [1, 2], "b": [0.5, null], "d": ["2026-01-02T00:00:00", null], "3": ["x", "y"]});
    assert_eq!(result["data"], data, "{result}");
    assert!(result["html"].as_str().unwrap().contains("<table"));
    let list = bench.run(&id, "[1, {'a': None}]").await;
    assert_eq!(list.of("result")[0]["json"], json!([1, {"a": null}]));
    assert_eq!(list.value(), "[1, {'a': None}]");
    let raw = "from IPython.display import display\ndisplay({'text/latex': 'x', 'application/vnd.a': {'b': 1}}, raw=True)";
    let raw = bench.run(&id, raw).await;
    let expected = json!({"type": "result", "latex": "x", "extra": {"application/vnd.a": {"b": 1}}, "is_main_result": false});
    assert_eq!(*raw.of("result")[0], expected);
    let image =
        "from PIL import Image\ni = Image.new('RGB', (8, 8))\ni.save('x.png')\ni.show()\nNone";
    let image = bench.run(&id, image).await;
    assert!(
        image
            .of("result")
            .iter()
            .all(|result| result["png"].is_string()),
        "{image:?}"
    );
    assert_eq!(image.of("result").len(), 2);
    let long = bench.run(&id, "list(range(2000))").await;
    assert!(long.value().ends_with("1999]"));
}

#[tokio::test]
async fn lines_points_and_their_axes() {
    let bench = Bench::new();
    let id = bench.context("python").await;
    let line = chart(
        &bench,
        &id,
        "
d = [datetime.date(2023, 9, 1) + datetime.timedelta(seconds=i) for i in range(3)]
plt.plot(d, [0, 1, 2], label='sin(x)'); plt.plot(d, [2, 1, float('nan')])
plt.axhline(1)
plt.xlabel('Time (s)'); plt.ylabel('Amplitude (Hz)'); plt.title('T')",
    )
    .await;
    assert_eq!(line["type"], "line");
    assert_eq!(
        (&line["title"], &line["x_unit"], &line["y_unit"]),
        (&json!("T"), &json!("s"), &json!("Hz"))
    );
    assert_eq!(
        (&line["x_scale"], &line["y_scale"]),
        (&json!("datetime"), &json!("linear"))
    );
    assert!(line["x_ticks"][0].as_str().unwrap().starts_with("20"));
    assert!(
        line["y_ticks"]
            .as_array()
            .unwrap()
            .iter()
            .all(Value::is_f64)
    );
    assert!(line["y_tick_labels"][0].is_string());
    assert_eq!(
        line["elements"][0],
        json!({"label": "sin(x)", "points": [["2023-09-01", 0.0], ["2023-09-01", 1.0], ["2023-09-01", 2.0]]})
    );
    assert_eq!(line["elements"][1]["label"], "Line 1");
    assert_eq!(line["elements"].as_array().unwrap().len(), 2);

    let log = chart(
        &bench,
        &id,
        "plt.plot([1, 2], [1, 100]); plt.yscale('log'); plt.ylabel('Y (log scale)')",
    )
    .await;
    assert_eq!(
        (&log["y_scale"], &log["y_unit"], &log["title"]),
        (&json!("log"), &json!("log scale"), &Value::Null)
    );

    let categories = chart(&bench, &id, "plt.plot([1, 2], ['A', 'B'])").await;
    assert_eq!(
        (&categories["x_scale"], &categories["y_scale"]),
        (&json!("linear"), &json!("categorical"))
    );
    assert_eq!(
        categories["elements"][0]["points"],
        json!([[1.0, "A"], [2.0, "B"]])
    );

    let points = chart(
        &bench,
        &id,
        "plt.scatter([1, 2], [3, 4], label='D1'); plt.scatter(['1'], [3])"
            .replace("['1']", "[5]")
            .as_str(),
    )
    .await;
    assert_eq!(points["type"], "scatter");
    assert_eq!(
        points["elements"][0],
        json!({"label": "D1", "points": [[1.0, 3.0], [2.0, 4.0]]})
    );
    assert_eq!(points["elements"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn bars_pies_boxes_and_several_at_once() {
    let bench = Bench::new();
    let id = bench.context("python").await;
    let bars = chart(
        &bench,
        &id,
        "plt.bar(['A', 'B'], [100, 200.5], label='Books'); plt.xlabel('Who'); plt.ylabel('N')",
    )
    .await;
    assert_eq!(
        bars,
        json!({
            "type": "bar", "title": null, "x_label": "Who", "y_label": "N", "x_unit": null, "y_unit": null,
            "elements": [
                {"label": "A", "group": "Books", "value": 100.0},
                {"label": "B", "group": "Books", "value": 200.5},
            ],
        })
    );
    let lying = chart(
        &bench,
        &id,
        "plt.barh(['A', 'B'], [1, 2]); plt.xlabel('N'); plt.ylabel('Who')",
    )
    .await;
    assert_eq!(
        (&lying["x_label"], &lying["y_label"]),
        (&json!("Who"), &json!("N"))
    );
    assert_eq!(
        lying["elements"][1],
        json!({"label": "B", "group": "Group 0", "value": 2.0})
    );

    let pie = chart(&bench, &id, "plt.pie([90, 10], labels=['No', 'No, in blue'], autopct='%1.1f%%', startangle=90); plt.title('P')").await;
    assert_eq!(
        pie,
        json!({"type": "pie", "title": "P", "elements": [
            {"label": "No", "angle": 324.0, "radius": 1.0},
            {"label": "No, in blue", "angle": 36.0, "radius": 1.0},
        ]})
    );

    let boxes = chart(&bench, &id, "
fig, ax = plt.subplots()
ax.boxplot([[85, 90, 78, 92, 88], [95, 89, 76, 91, 84, 87]], tick_labels=['A', 'B'], patch_artist=True)
ax.set_xlabel('Class')").await;
    assert_eq!(boxes["type"], "box_and_whisker");
    assert_eq!(
        boxes["elements"][1],
        json!({
            "label": "B", "min": 84.0, "first_quartile": 84.75, "median": 88.0, "third_quartile": 90.5, "max": 95.0, "outliers": [76.0],
        })
    );
    assert_eq!(boxes["elements"][0]["outliers"], json!([]));

    let several = chart(
        &bench,
        &id,
        "
fig, (a, b) = plt.subplots(1, 2); fig.suptitle('S')
a.plot([1, 2], [1, 2]); a.set_title('L'); a.grid(True)
b.scatter([1], [2])",
    )
    .await;
    assert_eq!(
        (&several["type"], &several["title"]),
        (&json!("superchart"), &json!("S"))
    );
    assert_eq!(
        (
            &several["elements"][0]["type"],
            &several["elements"][0]["title"]
        ),
        (&json!("line"), &json!("L"))
    );
    assert_eq!(several["elements"][1]["type"], "scatter");

    let unknown = chart(
        &bench,
        &id,
        "
fig, ax = plt.subplots(); ax.add_artist(plt.Circle((0, 0), 1)); ax.grid(True); plt.title('C')",
    )
    .await;
    assert_eq!(
        unknown,
        json!({"type": "unknown", "title": "C", "elements": []})
    );
}
