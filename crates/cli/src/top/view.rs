//! How `netkernel top` looks.

use std::cmp::Ordering;
use std::collections::VecDeque;

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Clear, Paragraph, Row, Sparkline, Table};

use super::model::{Model, Rates};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    Tenants,
    Nsms,
    Guests,
    Sockets,
    Stages,
}

pub const VIEWS: [View; 5] = [View::Tenants, View::Nsms, View::Guests, View::Sockets, View::Stages];

impl View {
    pub fn name(self) -> &'static str {
        match self {
            View::Tenants => "tenants",
            View::Nsms => "stacks",
            View::Guests => "guests",
            View::Sockets => "sockets",
            View::Stages => "latency",
        }
    }

    fn index(self) -> usize {
        VIEWS.iter().position(|view| *view == self).unwrap_or(0)
    }

    pub fn after(self, step: usize) -> View {
        VIEWS[(self.index() + step) % VIEWS.len()]
    }
}

/// What the person at the keys chose.
#[derive(Clone, Debug)]
pub struct Ui {
    pub view: View,
    /// Of each view: the column to sort by, the largest first or the smallest.
    sorts: [(usize, bool); VIEWS.len()],
    pub first: usize,
    pub paused: bool,
    pub help: bool,
    /// What went wrong last.
    pub trouble: Option<String>,
    pub colour: bool,
}

impl Ui {
    pub fn new(colour: bool) -> Ui {
        // What is sent and received; of stages, the name.
        let sorts = [(3, true), (3, true), (5, true), (7, true), (0, false)];
        Ui { view: View::Guests, sorts, first: 0, paused: false, help: false, trouble: None, colour }
    }

    /// The next column, or the one before.
    pub fn sort_by(&mut self, forward: bool) {
        let count = columns(self.view).len();
        let (column, _) = &mut self.sorts[self.view.index()];
        *column = (*column + if forward { 1 } else { count - 1 }) % count;
    }

    pub fn reverse(&mut self) {
        let (_, falling) = &mut self.sorts[self.view.index()];
        *falling = !*falling;
    }

    fn style(&self, colour: Color, modifier: Modifier) -> Style {
        let style = Style::new().add_modifier(modifier);
        if self.colour { style.fg(colour) } else { style }
    }
}

/// A column: head, cells at the right, how soon it goes when there is no room (0: never).
struct Column {
    head: &'static str,
    right: bool,
    goes: u8,
}

const fn left(head: &'static str, goes: u8) -> Column {
    Column { head, right: false, goes }
}

const fn right(head: &'static str, goes: u8) -> Column {
    Column { head, right: true, goes }
}

fn columns(view: View) -> &'static [Column] {
    match view {
        View::Tenants => {
            &const {
                [
                    left("TENANT", 0),
                    right("GUESTS", 4),
                    right("SOCKETS", 3),
                    right("IN bit/s", 0),
                    right("OUT bit/s", 0),
                    right("OPS/s", 2),
                    left("HISTORY", 5),
                    right("CONNECTIONS", 6),
                    left("LIMITS", 7),
                ]
            }
        }
        View::Nsms => {
            &const {
                [
                    left("STACK", 0),
                    right("GUESTS", 3),
                    right("SOCKETS", 4),
                    right("IN bit/s", 0),
                    right("OUT bit/s", 0),
                    right("OPS/s", 2),
                    left("HISTORY", 5),
                    left("KIND", 6),
                ]
            }
        }
        View::Guests => {
            &const {
                [
                    right("GUEST", 1),
                    left("NAME", 0),
                    left("TENANT", 5),
                    left("STACK", 4),
                    left("ATTACHMENT", 7),
                    right("IN bit/s", 0),
                    right("OUT bit/s", 0),
                    right("OPS/s", 3),
                    left("HISTORY", 6),
                    right("SOCKETS", 5),
                    right("PROCESSES", 9),
                    right("PID", 8),
                ]
            }
        }
        View::Sockets => {
            &const {
                [
                    left("NETID", 6),
                    left("STATE", 4),
                    right("RECV-Q", 5),
                    right("SEND-Q", 5),
                    left("LOCAL", 0),
                    left("PEER", 0),
                    left("PROCESS", 3),
                    right("IN bit/s", 1),
                    right("OUT bit/s", 1),
                    right("RTT", 6),
                    left("TENANT", 8),
                    left("STACK", 7),
                    left("ATTACHMENT", 9),
                ]
            }
        }
        View::Stages => {
            &const {
                [
                    left("STACK", 0),
                    left("STAGE", 0),
                    right("SAMPLES", 3),
                    right("MEAN", 2),
                    right("P50", 0),
                    right("P90", 4),
                    right("P99", 0),
                    right("MOST", 5),
                ]
            }
        }
    }
}

/// A cell: what stands in it, and what it is sorted by.
struct Cell {
    text: String,
    key: Key,
}

enum Key {
    Number(f64),
    Text(String),
}

fn word(text: impl Into<String>) -> Cell {
    let text = text.into();
    Cell { key: Key::Text(text.clone()), text }
}

fn count(value: u64) -> Cell {
    Cell { text: value.to_string(), key: Key::Number(value as f64) }
}

fn rate(bytes: f64) -> Cell {
    Cell { text: short(bytes * 8.0), key: Key::Number(bytes) }
}

fn plain(value: f64) -> Cell {
    Cell { text: short(value), key: Key::Number(value) }
}

fn time(ns: u64) -> Cell {
    let text = match ns {
        0 => "-".into(),
        1..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        _ => format!("{:.1} ms", ns as f64 / 1e6),
    };
    Cell { text, key: Key::Number(ns as f64) }
}

/// Three figures and a letter.
pub fn short(value: f64) -> String {
    let (value, unit) = match value {
        v if v >= 999.5e9 => (v / 1e12, " T"),
        v if v >= 999.5e6 => (v / 1e9, " G"),
        v if v >= 999.5e3 => (v / 1e6, " M"),
        v if v >= 999.5 => (v / 1e3, " k"),
        v => return format!("{v:.0}"),
    };
    match value {
        v if v >= 99.95 => format!("{v:.0}{unit}"),
        v if v >= 9.995 => format!("{v:.1}{unit}"),
        v => format!("{v:.2}{unit}"),
    }
}

/// The last points of a history, each as a bar of one letter.
fn bars(history: Option<&VecDeque<u64>>, width: usize) -> Cell {
    const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let points: Vec<u64> = history
        .into_iter()
        .flatten()
        .rev()
        .take(width)
        .copied()
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .collect();
    let most = points.iter().copied().max().unwrap_or(0).max(1);
    let bar = |&point: &u64| BARS[(point * 8).div_ceil(most).min(8) as usize];
    let text = points.iter().map(bar).collect();
    Cell { text, key: Key::Number(points.last().copied().unwrap_or(0) as f64) }
}

const BARS_WIDTH: usize = 12;

fn cells(view: View, model: &Model) -> Vec<Vec<Cell>> {
    let shown = &model.shown;
    let history = |key: String| bars(model.histories.get(&key), BARS_WIDTH);
    let rates = |rates: Rates| [rate(rates.bytes_in), rate(rates.bytes_out), plain(rates.operations)];
    match view {
        View::Tenants => shown
            .tenants
            .iter()
            .map(|row| {
                let [bytes_in, bytes_out, operations] = rates(row.rates);
                let connections = row.connections.map_or_else(|| word("-"), count);
                vec![
                    word(crate::show::printable(&row.name)),
                    count(row.guests),
                    count(row.sockets),
                    bytes_in,
                    bytes_out,
                    operations,
                    history(format!("tenant {}", row.name)),
                    connections,
                    word(if row.about.is_empty() { "-" } else { &row.about }),
                ]
            })
            .collect(),
        View::Nsms => shown
            .nsms
            .iter()
            .map(|row| {
                let [bytes_in, bytes_out, operations] = rates(row.rates);
                vec![
                    word(crate::show::printable(&row.name)),
                    count(row.guests),
                    count(row.sockets),
                    bytes_in,
                    bytes_out,
                    operations,
                    history(format!("nsm {}", row.name)),
                    word(&row.about),
                ]
            })
            .collect(),
        View::Guests => shown
            .guests
            .iter()
            .map(|row| {
                let [bytes_in, bytes_out, operations] = rates(row.rates);
                vec![
                    count(row.id.into()),
                    word(&row.name),
                    word(&row.tenant),
                    word(&row.nsm),
                    word(&row.attachment),
                    bytes_in,
                    bytes_out,
                    operations,
                    history(format!("guest {}", row.id)),
                    count(row.sockets),
                    count(row.processes),
                    count(row.pid.max(0) as u64),
                ]
            })
            .collect(),
        View::Sockets => shown
            .sockets
            .iter()
            .map(|row| {
                let process =
                    if row.pid == 0 { String::from("-") } else { format!("{} ({})", row.process, row.pid) };
                vec![
                    word(row.netid),
                    word(&row.state),
                    count(row.receive_queue.into()),
                    count(row.send_queue.into()),
                    word(&row.local),
                    word(&row.peer),
                    word(process),
                    rate(row.rates.bytes_in),
                    rate(row.rates.bytes_out),
                    time(row.rtt_us.map_or(0, |us| u64::from(us) * 1000)),
                    word(&row.tenant),
                    word(&row.nsm),
                    word(&row.attachment),
                ]
            })
            .collect(),
        View::Stages => shown
            .stages
            .iter()
            .map(|row| {
                vec![
                    word(&row.nsm),
                    word(row.stage),
                    count(row.samples),
                    time(row.mean_ns),
                    time(row.p50_ns),
                    time(row.p90_ns),
                    time(row.p99_ns),
                    time(row.most_ns),
                ]
            })
            .collect(),
    }
}

fn order(a: &Cell, b: &Cell) -> Ordering {
    match (&a.key, &b.key) {
        (Key::Number(a), Key::Number(b)) => a.total_cmp(b),
        (Key::Text(a), Key::Text(b)) => a.cmp(b),
        (Key::Number(_), Key::Text(_)) => Ordering::Less,
        (Key::Text(_), Key::Number(_)) => Ordering::Greater,
    }
}

/// Rows in order, as text.
fn rows(ui: &Ui, model: &Model) -> Vec<Vec<String>> {
    let mut all = cells(ui.view, model);
    let (column, falling) = ui.sorts[ui.view.index()];
    all.sort_by(|a, b| {
        let order = order(&a[column], &b[column]);
        if falling { order.reverse() } else { order }
    });
    all.into_iter().map(|row| row.into_iter().map(|cell| cell.text).collect()).collect()
}

/// The columns that fit, and their widths.
fn fitting(columns: &[Column], rows: &[Vec<String>], width: usize) -> Vec<(usize, usize)> {
    let mut fit: Vec<(usize, usize)> = columns
        .iter()
        .enumerate()
        .map(|(i, column)| {
            let widest = rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0);
            let least = if column.head == "HISTORY" { BARS_WIDTH } else { column.head.len() };
            // The one that is sorted by has a mark.
            (i, widest.max(least + 1))
        })
        .collect();
    while fit.iter().map(|(_, width)| width + 1).sum::<usize>() > width + 1 {
        let Some(at) = (0..fit.len()).rev().max_by_key(|&at| columns[fit[at].0].goes) else { break };
        if columns[fit[at].0].goes == 0 {
            break;
        }
        fit.remove(at);
    }
    fit
}

/// The same table for scripts and pipes.
pub fn text(ui: &Ui, model: &Model, width: usize) -> String {
    let mut out = String::new();
    let (columns, rows) = (columns(ui.view), rows(ui, model));
    let fit = fitting(columns, &rows, width);
    let heads = columns.iter().map(|column| column.head.to_owned()).collect();
    for row in std::iter::once(&heads).chain(&rows) {
        let mut line = String::new();
        for &(i, width) in &fit {
            match columns[i].right {
                true => line.push_str(&format!("{:>width$} ", row[i])),
                false => line.push_str(&format!("{:<width$} ", row[i])),
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

pub fn summary(model: &Model) -> String {
    let shown = &model.shown;
    let up = shown.uptime_seconds;
    format!(
        "up {}:{:02}:{:02}, {} guests, {} sockets; in {}bit/s, out {}bit/s, {} operations/s",
        up / 3600,
        up / 60 % 60,
        up % 60,
        shown.guest_count,
        shown.socket_count,
        unit(shown.total.bytes_in * 8.0),
        unit(shown.total.bytes_out * 8.0),
        short(shown.total.operations),
    )
}

/// With a blank before the unit's letter, or for it.
fn unit(value: f64) -> String {
    let text = short(value);
    if text.contains(' ') { text } else { text + " " }
}

pub fn draw(frame: &mut Frame<'_>, ui: &mut Ui, model: &Model) {
    let area = frame.area();
    if area.height < 4 || area.width < 24 {
        // No room for a table.
        frame.render_widget(Paragraph::new(summary(model)), area);
        return;
    }
    let graphs = if area.height >= 16 && area.width >= 60 { 3 } else { 0 };
    let [head, graph, tabs, table, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(graphs),
        Constraint::Length(1),
        Constraint::Min(1),
        Constraint::Length(1),
    ])
    .areas(area);
    let bold = ui.style(Color::Reset, Modifier::BOLD);
    let line = Line::from(vec![Span::styled("netkernel ", bold), Span::raw(summary(model))]);
    frame.render_widget(Paragraph::new(line), head);
    if graphs > 0 {
        draw_graphs(frame, graph, ui, model);
    }
    let names = VIEWS.iter().enumerate().flat_map(|(i, view)| {
        let style = if *view == ui.view { ui.style(Color::Cyan, Modifier::REVERSED) } else { Style::new() };
        [Span::styled(format!(" {} {} ", i + 1, view.name()), style), Span::raw(" ")]
    });
    frame.render_widget(Paragraph::new(Line::from_iter(names)), tabs);
    draw_table(frame, table, ui, model);
    let foot_text = match (&ui.trouble, ui.paused) {
        (Some(trouble), _) => Span::styled(trouble.clone(), ui.style(Color::Red, Modifier::BOLD)),
        (None, true) => Span::styled("paused: p goes on", ui.style(Color::Yellow, Modifier::BOLD)),
        (None, false) => Span::raw("q quit  1-5 view  </> sort by  r reverse  p pause  h help"),
    };
    frame.render_widget(Paragraph::new(Line::from(foot_text)), foot);
    if ui.help {
        draw_help(frame, area);
    }
}

fn draw_graphs(frame: &mut Frame<'_>, area: Rect, ui: &Ui, model: &Model) {
    let halves: [Rect; 2] =
        Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).spacing(1).areas(area);
    for (half, name, history, colour) in
        [(halves[0], "in", &model.total_in, Color::Green), (halves[1], "out", &model.total_out, Color::Blue)]
    {
        let [label, bars] = Layout::horizontal([Constraint::Length(14), Constraint::Fill(1)]).areas(half);
        let most = history.iter().copied().max().unwrap_or(0);
        let text = vec![
            Line::from(format!("{name} {}", short(history.back().copied().unwrap_or(0) as f64 * 8.0))),
            Line::from(format!("most {}", short(most as f64 * 8.0))),
        ];
        frame.render_widget(Paragraph::new(text), label);
        let skip = history.len().saturating_sub(bars.width.into());
        let points: Vec<u64> = history.iter().skip(skip).copied().collect();
        frame.render_widget(
            Sparkline::default().data(points).style(ui.style(colour, Modifier::empty())),
            bars,
        );
    }
}

fn draw_table(frame: &mut Frame<'_>, area: Rect, ui: &mut Ui, model: &Model) {
    let (columns, rows) = (columns(ui.view), rows(ui, model));
    let fit = fitting(columns, &rows, area.width.into());
    let (sorted, falling) = ui.sorts[ui.view.index()];
    let room = usize::from(area.height.saturating_sub(1)).max(1);
    ui.first = ui.first.min(rows.len().saturating_sub(room));
    let cell = |text: String, right: bool| {
        Line::from(text).alignment(if right { Alignment::Right } else { Alignment::Left })
    };
    let head = fit.iter().map(|&(i, _)| {
        let mark = match (i == sorted, falling) {
            (false, _) => "",
            (true, true) => "v",
            (true, false) => "^",
        };
        cell(format!("{}{mark}", columns[i].head), columns[i].right)
    });
    let body = rows.iter().skip(ui.first).take(room).map(|row| {
        Row::new(fit.iter().map(|&(i, _)| cell(row[i].clone(), columns[i].right)).collect::<Vec<_>>())
    });
    let widths = fit.iter().map(|&(_, width)| Constraint::Length(width as u16));
    let table = Table::new(body, widths)
        .column_spacing(1)
        .header(Row::new(head.collect::<Vec<_>>()).style(ui.style(Color::Yellow, Modifier::BOLD)));
    frame.render_widget(table, area);
}

const HELP: &str = " q, Esc, Ctrl-C   quit
 1-5, Tab         tenants, stacks, guests, sockets, latency
 < >              sort by the column before, after
 r                reverse the order
 up, down, PgUp, PgDn, Home   move
 p, space         pause
 + -              look more, less often
 h, ?             this help

 Rates are of payload, between two looks.
 latency: of a queue element in 64; queue is from the
 guest's push until it is taken, service what the engine
 does with it, stack one call of the stack.
";

fn draw_help(frame: &mut Frame<'_>, area: Rect) {
    let (width, height) = (60.min(area.width), (HELP.lines().count() as u16 + 1).min(area.height));
    let help = Rect::new((area.width - width) / 2, (area.height - height) / 2, width, height);
    frame.render_widget(Clear, help);
    let style = Style::new().add_modifier(Modifier::REVERSED);
    frame.render_widget(Paragraph::new(HELP).style(style), help);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::model::tests::look;
    use super::*;

    fn model() -> Model {
        let mut model = Model::default();
        model.take(look(1.0, 1000, 0));
        model.take(look(2.0, 126_000_000, 5000));
        model
    }

    fn screen(ui: &mut Ui, model: &Model, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, ui, model)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..height).map(line).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn each_view_shows_what_it_is_about() {
        let (model, mut ui) = (model(), Ui::new(false));
        let guests = screen(&mut ui, &model, 120, 24);
        assert!(guests.contains("netkernel up 1:01:40, 2 guests, 6 sockets; in 1.01 Gbit/s"), "{guests}");
        assert!(guests.contains("most 1.01 G"), "{guests}");
        let lines: Vec<&str> = guests.lines().filter(|l| l.contains("queued")).collect();
        assert!(lines[0].contains("web") && lines[0].contains("1.01 G"), "the faster one is first: {guests}");
        assert!(!guests.contains('\u{1b}'), "{guests}");
        for (view, words) in [
            (View::Tenants, ["blue", "out 1 Gbit/s"]),
            (View::Nsms, ["cubic", "kernel, bbr"]),
            (View::Stages, ["queue", "1.0 us"]),
            (View::Sockets, ["RECV-Q", "PROCESS"]),
        ] {
            ui.view = view;
            let text = screen(&mut ui, &model, 120, 24);
            for word in words {
                assert!(text.contains(word), "{word} is not in {text}");
            }
        }
    }

    #[test]
    fn any_size_of_a_terminal_will_do() {
        let model = model();
        for view in VIEWS {
            for help in [false, true] {
                for (width, height) in
                    [(1, 1), (5, 2), (23, 30), (24, 4), (40, 6), (80, 15), (80, 24), (500, 100), (200, 3)]
                {
                    let mut ui = Ui { view, help, ..Ui::new(true) };
                    screen(&mut ui, &model, width, height);
                }
            }
        }
        // What counts stays when there is little room.
        let text = screen(&mut Ui::new(false), &model, 40, 8);
        assert!(text.contains("web") && text.contains("1.01 G") && !text.contains("PROCESSES"), "{text}");
    }

    #[test]
    fn without_colour_there_is_none() {
        let (model, mut ui) = (model(), Ui { trouble: Some("no engine".into()), ..Ui::new(false) });
        let mut terminal = Terminal::new(TestBackend::new(100, 30)).unwrap();
        terminal.draw(|frame| draw(frame, &mut ui, &model)).unwrap();
        let coloured = |cell: &&ratatui::buffer::Cell| cell.fg != Color::Reset || cell.bg != Color::Reset;
        assert_eq!(terminal.backend().buffer().content.iter().filter(coloured).count(), 0);
        ui.colour = true;
        terminal.draw(|frame| draw(frame, &mut ui, &model)).unwrap();
        assert!(terminal.backend().buffer().content.iter().any(|cell| cell.fg == Color::Red));
    }

    #[test]
    fn the_order_is_the_one_that_was_asked_for() {
        let (model, mut ui) = (model(), Ui::new(false));
        let first = |ui: &Ui| rows(ui, &model)[0][1].clone();
        assert_eq!(first(&ui), "web");
        ui.reverse();
        assert_eq!(first(&ui), "evil?[2J");
        for _ in 0..4 {
            ui.sort_by(false);
        }
        assert_eq!(ui.sorts[View::Guests.index()].0, 1);
        assert_eq!(first(&ui), "evil?[2J", "by name");
        let text = text(&Ui::new(false), &model, 200);
        assert!(text.trim_start().starts_with("GUEST NAME"), "{text}");
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (999.0, "999"),
            (1000.0, "1.00 k"),
            (12_345.0, "12.3 k"),
            (999_600.0, "1.00 M"),
            (1e12, "1.00 T"),
        ] {
            assert_eq!(short(value), text);
        }
    }
}
