<?php
// For `php -S`: the file whose name FILE says, and the sum of what is sent.
if ($_SERVER['REQUEST_METHOD'] === 'POST') {
    echo hash('sha256', file_get_contents('php://input'));
} else {
    header('Content-Type: application/octet-stream');
    readfile(getenv('FILE'));
}
